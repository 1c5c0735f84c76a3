"""Models without weights for tests of the probes: one that remembers everything, and broken ones."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class Cache:
    def __init__(self, ids_BT: Tensor) -> None:
        self.ids_BT = ids_BT

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.ids_BT = self.ids_BT.repeat_interleave(repeats, 0)


class Oracle(nn.Module):
    """Predicts what followed the longest earlier match of the text so far: it solves every probe.

    Args:
        window: sees so many tokens alone.
        shuffled: remembers the sequence of another row: a state in the wrong place.
        sees_answers: a mask that is one token too wide, in the parallel pass alone, which has a next token.
    """

    device = torch.device("cpu")

    def __init__(self, vocab_size: int, *, window: int = 10**9, shuffled: bool = False, sees_answers: bool = False):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, get_text_config=lambda: self.config)
        self.window, self.shuffled, self.sees_answers = window, shuffled, sees_answers

    def forward(self, input_ids, past_key_values=None, use_cache=False, logits_to_keep=0):
        seen_BT = input_ids if past_key_values is None else torch.cat([past_key_values.ids_BT, input_ids], 1)
        (B, T), first = seen_BT.shape, seen_BT.shape[1] - input_ids.shape[1]
        remembered = seen_BT.roll(1, 0) if self.shuffled else seen_BT
        logits = torch.zeros(B, T - first, self.config.vocab_size)
        match_BE = torch.zeros(B, T, dtype=torch.long)  # length of the match that ends at E and at the token before t
        place_E = torch.arange(T)
        for t in range(T):
            longer_BE = torch.cat([torch.ones(B, 1, dtype=torch.long), match_BE[:, :-1] + 1], 1)
            match_BE = torch.where(remembered == seen_BT[:, t, None], longer_BE, 0)
            if t < first:
                continue
            in_sight_E = (place_E < t) & (place_E > t - self.window)
            length_BE = match_BE * in_sight_E
            # First appearances win: noise may repeat a key later.
            length_B, end_B = length_BE.max(1).values, length_BE.argmax(1)
            follower_B = remembered.gather(1, end_B[:, None] + 1 if T > 1 else end_B[:, None])[:, 0]
            if self.sees_answers and t + 1 < T:
                length_B, follower_B = torch.ones_like(length_B), seen_BT[:, t + 1]
            logits[torch.arange(B), t - first, follower_B] = torch.where(length_B > 0, 20.0, 0.0)
        logits = logits[:, -1:] if logits_to_keep == 1 else logits
        return SimpleNamespace(logits=logits, past_key_values=Cache(seen_BT))
