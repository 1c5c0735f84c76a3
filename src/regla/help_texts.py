"""What `regla --help` and `regla COMMAND --help` say besides the options."""

MAIN = """\
ReGLA language models: linear attention with a refined gate, constant memory per generated token.

examples:
  regla train --out runs/regla                        train on the English that ships with Python
  regla eval runs/regla                               perplexity on its held-out part
  regla generate runs/regla --prompt "The statement"  continue a text
  regla quickstart                                    see all of it in minutes: train, compare, stream, plot

`regla COMMAND --help` explains each command.
"""

TRAIN = """\
Train a causal language model by cross-entropy, from scratch or from the weights of --init, and save it as a Hugging
Face folder (weights, config, tokenizer, generation config, training.json with arguments and scores).

Without --data it trains on the language reference that every CPython ships, in about a minute on two CPU cores.
All mixers compare at equal parameters: --intermediate-size is the MLP width of the softmax model; where ReGLA layers
replace softmax ones, the MLP gives up as many parameters as they add, to within 0.5 % (the exact count is printed).

examples:
  regla train --out runs/regla
  regla train --out runs/softmax --mixer softmax
  regla train --out runs/mine --data book.txt notes.txt --steps 1000
  regla train --out runs/conv --config conv.json              where conv.json holds {"linear_conv_kernel_dim": 4}
  regla train --out runs/wiki --dataset wikitext:wikitext-103-raw-v1 --steps 5000

34M parameters, 26M tokens on a GPU, from tokens prepared by `regla tokenize`:
  regla tokenize --vocab-size 16384 --out tokens train.txt valid.txt
  regla train --out runs/large --tokenizer tokens --data tokens/train.bin --valid tokens/valid.bin \\
    --hidden-size 512 --layers 8 --heads 8 --seq-len 1024 --batch-size 64 --steps 400 --lr 2e-3 --warmup 60 \\
    --device cuda --dtype bfloat16 --compile

Sources with weights, which are shares of the tokens, from shards that are read as they are needed:
  regla train --out runs/mix --tokenizer tokens --data tokens/web tokens/books --data-weights 0.7,0.3 \\
    --valid tokens/valid.bin --reset-at-documents

DIR/log.jsonl has a line per step, with loss spikes and, at each --eval-every or --inspect-every, the saturated gates
and the norm of the state of each linear layer. A step whose loss or gradient is not finite is skipped and named there;
too many of them (--max-skipped-steps) end the run. DIR/checkpoints keeps the last two checkpoints, one every
--save-every steps.
Ctrl-C or SIGTERM ends the run after the current step and saves a checkpoint and the model as it is then (exit code 130
or 143). After that, or after a crash, the same command with --resume goes on from the newest checkpoint as if nothing
had happened (on a CPU to the same weights, bit for bit); where none was saved yet, it starts from the first step.
  regla train --out runs/mine --data book.txt notes.txt --steps 1000 --resume
A finished run goes on with more --steps: from its last checkpoint, with the learning rates of a run of that length.
  regla train --out runs/mine --data book.txt notes.txt --steps 2000 --resume
--carry-state reads the text in order, with the states of linear layers taken on from step to step.
  regla train --out runs/books --data books.txt --carry-state --batch-size 16
--init starts a new run from the weights, config and tokenizer of a trained or converted model.
  regla train --out runs/tuned --init runs/mine --data notes.txt --steps 200 --lr 3e-4

Several processes share every step (--parallel): ddp and fsdp share the sequences of a batch, sequence the tokens of
each sequence (every layer linear). All options count for all processes together, and a run goes on in any number of
them.
  torchrun --nproc-per-node 2 -m regla train --out runs/two --data book.txt --batch-size 32
"""

EVAL = """\
Score causal language models (ReGLA or any other): folders, .gguf files or names on the hub.

With --tasks: EleutherAI's lm-eval, its tasks, prompts and scores (in a checkout: pip install ".[eval]"), for several
models side by side, with standard errors and numbers of items. --data-dir reads boolq, piqa, hellaswag, winogrande,
truthfulqa_mc1, truthfulqa_mc2, lambada_openai, arc_easy, arc_challenge, openbookqa, sciq and copa from the files that
their authors published, without a network. A context that answers or items share runs once. After an interruption the
same command with --out goes on; nothing is scored twice.

Without --tasks and --probes: perplexity, by file and as the mean over files.
Each file is cut into windows of --seq-len tokens that do not overlap; every token is predicted once, from those before
it in its window. `loss` is in nats per token. `bits/byte` and `per word` (the perplexity of words between spaces)
compare models with different tokenizers.

--by-position shows the perplexity of the tokens 0-63, 64-127, 128-255, ... of the windows: what context is worth.
Windows may be longer than what the model was trained on.
--stream N scores the first N tokens of each file as one sequence instead, far beyond the length trained on if you like:
it is fed in chunks of --seq-len tokens through the cache, whose size does not grow in ReGLA layers.

--probes asks for what the model has read, instead: questions from --seed, --limit sequences for every cell of
--lengths, --depths, --pairs and --gaps, scored by likelihood (the right one of several candidates) and by free
generation (greedy, of the whole vocabulary), each with n and its standard error. mqar, induction and copy are in token
ids; passkey, needle and kv hide facts in text.

examples:
  regla eval runs/regla runs/softmax --tasks boolq piqa hellaswag --out runs/tasks
  regla eval runs/regla --tasks lambada_openai arc_easy --num-fewshot 5 --data-dir eval --limit 100
  regla eval runs/regla                                       the held-out tenth of the embedded text
  regla eval runs/regla --data wiki.txt books.txt --json scores.json
  regla eval runs/regla --data book.txt --seq-len 8192 --by-position
  regla eval runs/regla --data book.txt --stream 100000 --by-position
  regla eval runs/regla runs/softmax --probes passkey,kv --lengths 512,2048 --out runs/probes
"""

INSPECT = """\
Look inside the linear layers of a model (pure, hybrid or converted) while it reads a text: histograms of the forget
gates and how many are saturated, half-lives of heads, how many features the keys use, and the norm of the state.

examples:
  regla inspect runs/regla                                    a table, on the embedded text
  regla inspect runs/regla --data book.txt --tokens 100000 --out runs/inside
"""

GENERATE = """\
Continue a text with the model in a Hugging Face folder; prints it token by token. Or continue many: --prompts takes a
UTF-8 file with one prompt a line (empty lines are passed over), runs --batch-size of them at a time and prints each
with its continuation, with --json as one JSON object a line: {"prompt": ..., "continuation": ...}.

--save-state writes the model's state at the end of the text to a file, with --max-new-tokens 0 that of the prompt.
--load-state continues from it, on any device, as if the text had not been interrupted; --prompt then adds to it.

examples:
  regla generate runs/regla --prompt "The statement"
  regla generate runs/regla --prompt "A class" --temperature 0 --max-new-tokens 200
  regla generate runs/regla --prompts prompts.txt --json > continuations.jsonl
  regla generate runs/regla --prompt "A long text" --max-new-tokens 0 --save-state text.state
  regla generate runs/regla --load-state text.state --prompt " and more of it"
"""

QUICKSTART = """\
See ReGLA learn, in about three minutes on two CPU cores and without a download: trains a small ReGLA, a hybrid and a
softmax model on equal parameters and tokens of the English that ships with Python, compares their validation
perplexities and speeds, shows that streaming equals the full forward pass, plots the losses and the cost of the next
token against the length of the context, and generates a sample. Then it makes every layer of a pretrained GPT-NeoX
linear, which comes with the package, and trains it until its perplexity is back.

DIR gets the models (regla, hybrid, softmax, linearized), loss.png, decoding.png and quickstart.json with every figure.
A second quickstart replaces the first.

examples:
  regla quickstart
  regla quickstart --out runs/longer --steps 600
"""

DOCTOR = """\
Say what this machine offers regla: versions, devices, whether bfloat16 is supported, which backend would run and why,
and which optional packages are there and what each is for. Exit code 0.

examples:
  regla doctor
  regla doctor --json
"""

LINEARIZE = """\
Put ReGLA into layers of a pretrained softmax model (Llama, SmolLM2, Mistral, Qwen2, Qwen3 with or without experts, text
models of Gemma 3, OLMo 2, Phi-3, Granite, GPT-NeoX, Pythia, GPT-2), train it to do what the original does, and save it
as a Hugging Face folder (weights, config, tokenizer, generation config, model card, linearize.json).

The pretrained projections move over, key and value heads shared as before; softmax attention run through them must
reproduce the original's logits. Then queries, keys, gates and output norms are fitted to the original's attention on a
few thousand tokens, and the figures of each layer are printed. Training is in stages: attention transfer (each new
layer learns its original's output; a third of --tokens), then distillation (the whole model learns the original's
predictions; the rest), and long-context tuning where --long-tokens says so. Without --tokens it only converts.

examples:
  regla linearize HuggingFaceTB/SmolLM2-135M --out runs/smol --tokens 60M
  regla linearize HuggingFaceTB/SmolLM2-135M --out runs/chosen --keep auto:25% --mixer delta --tokens 60M
  regla linearize model.gguf --out runs/smol --data wiki.txt books.txt --tokens 60M --dtype bfloat16
  regla linearize models/llama --out runs/all-linear --keep none --tokens 20M
  regla linearize models/llama --tokens 20M --dry-run
  regla linearize models/llama --init runs/all-linear --out runs/longer --tokens 20M
  regla linearize models/llama --out runs/branch --keep none --window-branch 16 --tokens 20M
  regla linearize models/llama --out runs/window --mixer window --keep none
  regla linearize models/llama --out runs/hedgehog --mixer hedgehog --keep none --preset paper --tokens 20M

--init goes on from a folder that this command wrote: further layers (--keep), more training (--tokens), or both.

Ctrl-C ends the training after the current step and saves the model as it is then (exit code 130). After that, or after
a crash, the same command with --resume goes on from the last checkpoint.
"""

REPORT = """\
Write one HTML page about a model that `regla linearize` made: what was converted, how each layer fits, the training,
teacher and student on the same held-out text with standard errors, half-lives and saturation of the forget gates, time
and memory of a token over the context, samples side by side, and the command that repeats the conversion. The page is
one file and needs no network.

Teacher and student are measured on the spot, in about a minute for a small model; --skip-measurements shows what the
folder holds alone.

examples:
  regla report runs/smol
  regla report runs/smol --teacher models/smollm2 --out smol.html
"""

STUDY = """\
Train a grid of runs that one short YAML file describes (what varies, learning rates, seeds), and compare them.
DIR gets a row per run (rows.jsonl), and NAME.md with tables and a plot. Every variant gets every learning rate.

STUDY is one that is shipped (gate-start, qk, mixer-parts, softmax, refined-vs-plain, finalists, final, memory,
memory-parts, longer, mqar, mqar-features, mqar-memory, demo, and of the paper's tables and figures feature-maps,
normalisation, gates, table-4, saturation, speed-and-memory, scaling) or a .yaml file.
Each run is a process of its own; its output is DIR/runs/*/log.txt. Ctrl-C or SIGTERM saves checkpoints and ends it
(exit code 130 or 143). After that, or after a crash, the same command goes on: finished runs are kept, and one that
was cut off goes on from its last checkpoint. A run that diverges is a result; where one fails, the others go on, and
the exit code is 1.

examples:
  regla study demo --out runs/demo
  regla study gate-start --dry-run
  regla study gate-start --tokenizer tokens --data tokens/train.bin --valid tokens/valid.bin --out runs/gate-start
  regla study gate-start --only 'value/*' --set steps=100 --set lr=[2e-3] --data book.txt --out runs/short --minutes 9
  regla study gate-start --report --rows benchmarks/studies/gate-start.jsonl --out docs/results
"""

BENCH = """\
Measure speed and memory. Every measurement is printed and appended to --out FILE.jsonl as one row with its quantiles,
the hardware, the versions and the commit as soon as it is there; what it is compared with is measured in the same run.

  ops     forward and backward of the operations: backends, PyTorch's softmax attention, fla's chunk_gla where installed
  decode  tokens/s of `generate` behind contexts of 1k to 64k: a 162M-parameter model against softmax of equal size
  train   tokens/s of training such models at lengths of 2k to 32k: ReGLA, softmax, and ReGLA without the recurrence
  eval    scoring of answers behind a shared prefix, with and without computing the prefix once
  distributed  several processes against one: losses, speed, memory of a long sequence, the end of a killed run
  cpu     the CPU path: each backend against the recurrence, cost of a token, memory of a forward pass
  data    peak memory of training and tokenizing at scale
  students  conversions of one pretrained model at equal tokens: perplexity, KL, recall, tasks

examples:
  regla bench ops --out benchmarks/gpu/h100.jsonl
  regla bench ops --only 'regla_attention/value/triton/*' 'softmax_attention/*'
  regla bench decode --only '*/batch64/*' --out rows.jsonl
  regla bench train --device cpu --quick

`regla bench WHAT --help` explains the options of each.
"""

BENCH_OPS = """\
Time the operations at the shapes that matter and over lengths of 512 to 32768 at a fixed number of tokens, forward and
forward+backward, and single steps of decoding. `of copy bandwidth` compares with a plain copy: each input read once and
each output written once, at a copy's rate (reading alone is faster and may exceed it); `extra memory` is beyond inputs,
outputs and gradients; `x sdpa` and `x fla` say how many times as fast as PyTorch's softmax attention and fla's
chunk_gla.

A case is called OPERATION/AXIS/BACKEND/SHAPE/DIRECTION:
  regla_attention/value/triton/B8-T2048-H12-64x64/forward+backward

examples:
  regla bench ops --out benchmarks/gpu/h100.jsonl
  regla bench ops --only '*/B8-T2048-*'
  regla bench ops --device cpu --quick
"""

BENCH_DECODE = """\
Time `generate` with a static cache that holds a context already: tokens per second of all sequences together, with the
floor (weights and cache moved once), peak memory and size of the cache. Where memory runs out, the row says so.

A case is called MODEL/batchN/contextN, such as regla/batch64/context16384. regla/batchN/in_turns repeats all contexts
in turns, so that a host whose pace changes does not decide which is faster; "x shortest" is the median of a context's
time over the shortest one's in the same turn.

examples:
  regla bench decode --out benchmarks/gpu/h100.jsonl
  regla bench decode --only '*/batch8/*'
  regla bench decode --device cpu --quick
"""

BENCH_TRAIN = """\
Time whole steps of training, forward, backward and AdamW, of a softmax model and of ReGLA at equal parameters, and of
that model without its recurrence: with values for outputs, all projections in place, and with every mixer replaced by
the identity. All have the same number of tokens in a step. Where memory runs out, the row says so, and another has
activation checkpointing. FLOP utilisation is of the rate that a product of matrices of 8,192 rows reaches.

A case is called MODEL/lengthN, such as regla/length2048.

examples:
  regla bench train --out benchmarks/gpu/h100.jsonl
  regla bench train --only '*/length2048' --eager
  regla bench train --lengths 2048 131072 --only 'regla/*' 'softmax/*'
  regla bench train --only 'regla/length2048' --profile
  regla bench train --config axis.json                        where axis.json holds {"gate_axis": "value"}
  regla bench train --device cpu --quick
"""

BENCH_DISTRIBUTED = """\
Compare training in several processes, which torchrun starts, with training in one of them: losses with each kind of
--parallel; tokens per second of ddp and fsdp, with as many sequences for each process as one alone has; one sequence of
131,072 tokens in parts: time, memory, bytes sent; and a run of which one process is killed and one process goes on.

A case is called MEASURE/KIND, such as throughput/ddp.

examples:
  torchrun --nproc-per-node 2 -m regla bench distributed --out benchmarks/gpu/h200.jsonl
  torchrun --nproc-per-node 2 -m regla bench distributed --only 'losses/*' --device cpu --quick
"""

BENCH_EVAL = """\
Time the scoring of four answers to a question, with the question run once and its state forked, and with every sequence
run whole; softmax, ReGLA and hybrid models of 162M parameters, questions of 128 to 2,048 tokens.

examples:
  regla bench eval --out benchmarks/gpu/eval.jsonl
  regla bench eval --only eval/hybrid --dtype float32
"""

BENCH_CPU = """\
Measure what the CPU path promises, one after the other in some minutes: forms, delta, decode, memory.

examples:
  regla bench cpu --out benchmarks/cpu.jsonl
  regla bench cpu --only memory
"""

BENCH_DATA = """\
Measure peak memory of training on tokens, of drawing batches from them alone, and of tokenizing, all from files that
are generated: train, draw, tokenize. Each is compared with the same on 8 MB.

examples:
  regla bench data --gigabytes 8 --only train draw --out benchmarks/data.jsonl
"""

BENCH_STUDENTS = """\
Convert one pretrained model in many ways at equal tokens, and measure every student alike: perplexity, KL to the
original, recall of passkeys and key-value facts by free generation, and tasks of lm-eval where --tasks names some.

A case is called by what it is:
  original; teacher, trained (the original on the same tokens, by cross-entropy); pure, every-2, every-4, auto:25%
  pure, ... : paper preset, no transfer, no calibration, window and sinks, delta, fast_decay, relu
  table 5, ... : relu, hedgehog, scalar, fast_decay, paper (the paper's preset)

Each conversion is a process of its own. One that fails is named at the end, with the last lines of its log and exit
code 1; the others go on. A case whose row is in --out already, with the same settings, is skipped: after an
interruption, repeat the command.

examples:
  regla bench students EleutherAI/pythia-160m --data train.bin --valid wiki.txt --unseen code.txt --tokens 60M \
    --tasks boolq piqa hellaswag --out benchmarks/students/pythia-160m.jsonl
  regla bench students models/small --data a.txt --valid b.txt --only original 'teacher*' 'table 5*' --tokens 5M
"""

TOKENIZE = """\
Write text files, or folders of them, as token files (NAME.bin: little-endian uint16 ids, every document ended by the
end-of-text token; NAME.bin.json: its length, documents and SHA-256) and the tokenizer beside them, for
`regla train --tokenizer DIR --data DIR/NAME.bin`.

Text is UTF-8; a line <|endoftext|> separates documents. It streams and need not fit into memory. Without --tokenizer, a
byte-level BPE is trained on the files. Records that cannot be used are left out and named in DIR/bad-records.json.

examples:
  regla tokenize --vocab-size 16384 --out tokens train.txt valid.txt
  regla tokenize --tokenizer tokens --out more-tokens other.txt
  regla tokenize --tokenizer tokens --out shards --shard-tokens 100000000 web/ books/
"""
