"""Which type each matrix of a GGUF file has, and how far a file is from being of one type.

A type map here is tensor name → type name in lower case, of the file's matrices. A file of another tool is rarely of
one type: the type that holds most of the weights inside the blocks stands for it, and a note says what else is in it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from llama import TensorInfo

BLOCK = "blk."


@dataclass(frozen=True)
class TypeMap:
    """types: tensor name → type name. n_elements: tensor name → weights."""

    types: Mapping[str, str]
    n_elements: Mapping[str, int]

    def overrides(self, type_name: str) -> dict[str, str]:
        """The matrices inside the blocks that are not of the one type asked for."""
        return {n: t for n, t in self.types.items() if n.startswith(BLOCK) and t != type_name}

    def majority(self) -> str:
        """The type of most weights inside the blocks; "" without a matrix there. Ties go to the first in the file."""
        count: Counter[str] = Counter()
        for name, type_name in self.types.items():
            if name.startswith(BLOCK):
                count[type_name] += self.n_elements[name]
        return count.most_common(1)[0][0] if count else ""

    def note(self, type_name: str, embedding: str) -> str:
        """What is not of the one type asked for, inside the blocks and out; "" if nothing is."""
        others = self.overrides(type_name)
        found = sorted(set(others.values()))
        notes = [f"{len(others)} of its matrices are {', '.join(found)}"] if others else []
        notes += [f"{n} is {t}" for n, t in self.types.items() if not n.startswith(BLOCK) and t != embedding]
        return "; ".join(notes)


def type_map(tensors: Mapping[str, TensorInfo], known: Mapping[str, TensorInfo]) -> TypeMap:
    """The type map of ``tensors``, of those matrices that are in ``known``, the source file, too."""
    matrices = {n: t for n, t in tensors.items() if n in known and len(t.shape) > 1}
    return TypeMap(
        {n: t.type_name.lower() for n, t in matrices.items()},
        {n: t.n_elements for n, t in matrices.items()},
    )
