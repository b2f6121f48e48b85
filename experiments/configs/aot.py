"""Configurations of `experiments.aot`: any model of `lm.formats.known`, to train and to serve.

--config=llama3_8b --config.mesh.fsdp=16 --config.mesh.tensor=4 --config.train.remat=matmuls
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from lm.aot.question import Aot
from lm.formats.known import KNOWN, known_model


def configuration(name: str) -> Aot:
    """That of a model in `lm.formats.known`."""
    return Aot(known_model(name))


CONFIGS: Mapping[str, Callable[[], Aot]] = {
    name: functools.partial(configuration, name) for name in KNOWN
}
