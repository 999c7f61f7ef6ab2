"""One engine of several that dies must not take the others' tests with it."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.engine_process import EngineProcess
from tests.engines_together import log_of, together


def start(log: Path, dies: bool) -> Any:
    log.write_text("capturing graphs")
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)  # as SGLang ends an engine whose scheduler failed
    return "an engine"


def ask(engine: Any, asks: list[Any]) -> list[list[Any]]:
    return [[engine]]


def process(log: Path, dies: bool) -> EngineProcess:
    return EngineProcess(start, ask, {}, log, dies)


@pytest.mark.parametrize("first_alone", [False, True])
def test_the_others_run(tmp_path: Path, first_alone: bool) -> None:
    makers = {"a dead one": partial(process, dies=True), "a live one": partial(process, dies=False)}
    with together(makers, tmp_path, first_alone) as engines:
        assert set(engines) == set(makers)
        assert engines["a live one"].ask([]) == [["an engine"]]
        with pytest.raises(RuntimeError, match="ended with code -9") as error:
            engines["a dead one"]
        assert "capturing graphs" in error.value.__notes__[0]
        assert log_of(tmp_path, "a live one") == "capturing graphs"
