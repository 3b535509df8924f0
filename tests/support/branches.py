"""A mapping of another library, as strict as a TensorDict, known to torch's pytree."""

from collections.abc import ItemsView, Iterator, KeysView, Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor


class Branch(Mapping[str, Any]):
    """Holds tensors and branches alone; has keys() and items(), but is not iterated itself."""

    def __init__(self, children: Mapping[str, Any]) -> None:
        self._children = {
            name: Branch(child) if isinstance(child, dict) else child
            for name, child in children.items()
        }
        if not all(isinstance(x, Tensor | Branch) for x in self._children.values()):
            raise TypeError(f"Branch: expected tensors, got {list(self._children.values())}")

    def __getitem__(self, name: str) -> Any:
        return self._children[name]

    def __iter__(self) -> Iterator[str]:
        raise TypeError("Branch: use keys()")

    def __contains__(self, name: object) -> bool:
        raise NotImplementedError("Branch: use keys()")

    def __len__(self) -> int:
        return len(self._children)

    def keys(self) -> KeysView[str]:
        return self._children.keys()

    def items(self) -> ItemsView[str, Any]:
        return self._children.items()


def _unflatten(children: Any, names: Any) -> Branch:
    if any(child is None for child in children):
        raise TypeError("Branch: expected tensors, got None")
    branch = Branch({})
    # torch's vmap and vjp rebuild containers with numbers and other objects as leaves.
    branch._children = dict(zip(names, children, strict=True))
    return branch


pytree.register_pytree_node(
    Branch,
    lambda branch: ([*branch._children.values()], (*branch._children,)),
    _unflatten,
    serialized_type_name="tests.support.branches.Branch",
    flatten_with_keys_fn=lambda branch: (
        [(pytree.MappingKey(name), child) for name, child in branch._children.items()],
        (*branch._children,),
    ),
)
