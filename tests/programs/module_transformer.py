"""An nn.TransformerEncoder with dropout by key and a padding mask, and weight decay."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdl import interop, optim, random
from tests.support.programs import Program

WORDS, WIDTH, BATCH, TIME = 12, 16, 4, 6


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, WIDTH, padding_idx=0)
        layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = torch.nn.Linear(WIDTH, 3)

    def forward(self, tokens):
        hidden = self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0)
        return self.head(hidden)


with torch.random.fork_rng():
    torch.manual_seed(0)
    model, params, _ = interop.from_module(Tagger().double())
optimizer = optim.chain(optim.add_decayed_weights(1e-2), optim.sgd(1e-2, momentum=0.9))


def step(state, tokens):
    params, opt, key = state
    key, dropout = random.split(key)

    def loss_fn(params):
        logits = model.apply(params, tokens, train=True, key=dropout)
        target = torch.where(tokens > 0, tokens % 3, -100)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)

    grads, loss = torch.func.grad_and_value(loss_fn)(params)
    updates, opt = optimizer.update(grads, opt, params)
    return (optim.apply_updates(params, updates), opt, key), loss


def sentences():
    tokens = random.randint(random.key(0), (4, BATCH, TIME), 1, WORDS)
    lengths = random.randint(random.key(1), (4, BATCH, 1), 2, TIME + 1)
    return torch.where(torch.arange(TIME) < lengths, tokens, 0)


PROGRAM = Program(
    step,
    init=lambda: (params, optimizer.init(params), random.key(2)),
    xs=sentences,
    fullgraph="torch._check",
)
