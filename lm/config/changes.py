"""Which fields of a configuration may differ when a run is started again, said at the field.

num_steps: int = may_change(300, "the learning-rate schedule ends there too")
"""

import dataclasses
from typing import Any, NamedTuple

from lm.config import codec


@dataclasses.dataclass(frozen=True)
class MayChange:
    """What the metadata `may_change` of a field says: a run may go on with another value.

    Attributes:
      note: what changes with it, for whoever reads the log.
      new_statistics: statistics of the steps before say nothing about those after.
    """

    note: str = ""
    new_statistics: bool = False


def may_change(default: Any, note: str = "", *, new_statistics: bool = False) -> Any:
    """A field with this default that may differ when a run is started again."""
    rule = MayChange(note, new_statistics)
    return dataclasses.field(default=default, metadata={"may_change": rule})


def change_rule(config: Any, path: str) -> MayChange | None:
    """The rule of the outermost field on a dotted path that may change; None if none may."""
    value = config
    for part in path.split("."):
        if dataclasses.is_dataclass(value):
            field = next((f for f in dataclasses.fields(value) if f.name == part), None)
            if field is not None and "may_change" in field.metadata:
                return field.metadata["may_change"]
            value = getattr(value, part, None)
        elif isinstance(value, tuple) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return None


class Change(NamedTuple):
    """One difference between two configurations, as `train.num_steps: 100 -> 200`.

    `allowed` is the field's rule if a run may go on with the new value, else None.
    """

    text: str
    allowed: MayChange | None


def changes(old: Any, new: Any) -> list[Change]:
    """What changed from one configuration to another of the same class."""
    return [
        Change(text, change_rule(new, text.partition(":")[0]))
        for text in codec.difference(old, new)
    ]
