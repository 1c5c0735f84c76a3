"""What every command that computes needs: device and precision, files, checkpoints, the log, signals, versions."""
