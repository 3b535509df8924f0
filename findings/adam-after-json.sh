#!/usr/bin/env bash
# torch 2.15.0: the state of an optimizer that went through JSON, where keys are strings, is loaded without a
# word and then not used. load_state_dict files it under '0' instead of the parameter, so the next step of
# Adam begins at 1 with moments of zero, and the old state travels along in every later state_dict. Expected: the
# sixth step, or an error. Make the keys integers before load_state_dict.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import torch

weight = torch.nn.Parameter(torch.ones(1))
adam = torch.optim.Adam([weight])
for _ in range(5):
    weight.grad = torch.ones(1)
    adam.step()
saved = adam.state_dict()
through_json = {**saved, "state": {str(key): value for key, value in saved["state"].items()}}

for name, state in (("as saved", saved), ("keys as strings", through_json)):
    new = torch.nn.Parameter(torch.ones(1))
    again = torch.optim.Adam([new])
    again.load_state_dict(state)
    new.grad = torch.ones(1)
    again.step()
    step = int(again.state[new]["step"])
    print(f"{name:16} the step after 5 is number {step}; keys of the state: "
          f"{[key if isinstance(key, str) else 'parameter' for key in again.state]}")
    assert step == (6 if name == "as saved" else 1), "torch has changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
