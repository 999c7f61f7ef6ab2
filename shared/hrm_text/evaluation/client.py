"""lm-eval's view of the served model: many requests at a time, each answer kept as it comes."""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM

from hrm_text.evaluation.server import Server

CONCURRENCY = 256
Answers = dict[str, Any]


class Ledger:
    """Answers by request, in a JSONL file that grows by a line an answer."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.answers: Answers = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break  # the write that an interruption cut short
                key, answer = json.loads(line)
                self.answers[key] = answer
                whole += len(line)
            with path.open("r+b") as file:
                file.truncate(whole)

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer, in the file too."""
        with self._lock, self._path.open("a") as file:
            file.write(json.dumps([key, answer]) + "\n")
            self.answers[key] = answer


class ServedModel(TemplateLM):
    """A model behind an OpenAI-compatible server, prompted with token ids.

    Args:
        server: to ask.
        tokenizer: the model's.
        ledger: where answers are kept, and looked for first.
        progress: called with (answers there are, answers there will be).
    """

    def __init__(self, server: Server, tokenizer: Any, ledger: Ledger, progress: Callable[[int, int], None]) -> None:
        super().__init__()
        self._server, self.tokenizer, self._ledger, self._progress = server, tokenizer, ledger, progress

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids: list[int] = self.tokenizer(string, add_special_tokens=False).input_ids
        return ids

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        jobs = []
        for prompt, options in (request.args for request in requests):
            body = {
                "prompt": self.tok_encode(prompt),
                "max_tokens": options["max_gen_toks"],
                "temperature": options["temperature"],
                "stop": options["until"],
                "skip_special_tokens": False,
            }
            jobs.append((self._generate, body))
        texts = self._answer(jobs)
        # As lm-eval's own backends: where a server leaves the stop string in, it is cut off.
        return [text.split(request.args[1]["until"][0])[0] for text, request in zip(texts, requests, strict=True)]

    def _generate(self, body: dict[str, Any]) -> str:
        answer = self._server.post("/v1/completions", {"model": self._server.name, **body})
        return str(answer["choices"][0]["text"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        score = {"vllm": self._score_vllm, "sglang": self._score_sglang}[self._server.engine]
        jobs = [(score, {"prompt": context + answer, "start": len(context)}) for _, context, answer in requests]
        # Whether an answer is also the greedy one, lm-eval's second value, plays no part in these tasks.
        return [(logprob, False) for logprob in self._answer(jobs)]

    def _score_vllm(self, job: dict[str, Any]) -> float:
        body = {"model": self._server.name, "prompt": job["prompt"], "max_tokens": 1, "temperature": 0}
        answer = self._server.post("/v1/completions", body | {"prompt_logprobs": 0})
        scored = answer["choices"][0]["prompt_logprobs"]
        return float(sum(scored[at][str(job["prompt"][at])]["logprob"] for at in range(job["start"], len(scored))))

    def _score_sglang(self, job: dict[str, Any]) -> float:
        # Not /v1/completions: it would ask for log-probs inside the span too.
        body = {
            "input_ids": job["prompt"],
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": job["start"] - 1,
        }
        answer = self._server.post("/generate", body)
        return float(sum(logprob for logprob, *_ in answer["meta_info"]["input_token_logprobs"][1:]))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("no task of this package scores whole texts")

    def _answer(self, jobs: Sequence[tuple[Callable[[Any], Any], dict[str, Any]]]) -> list[Any]:
        """An answer to each job, from the ledger or from the server."""
        keys = [hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() for _, body in jobs]
        pending = {key: job for key, job in zip(keys, jobs, strict=True) if key not in self._ledger.answers}
        total = len(set(keys))
        self._progress(total - len(pending), total)
        pool = ThreadPoolExecutor(CONCURRENCY)
        try:
            asked = {pool.submit(ask, body): key for key, (ask, body) in pending.items()}
            for done, future in enumerate(as_completed(asked), start=1):
                self._ledger.add(asked[future], future.result())
                self._progress(total - len(pending) + done, total)
        finally:
            # Not waiting: what is still under way ends with the server.
            pool.shutdown(wait=False, cancel_futures=True)
        return [self._ledger.answers[key] for key in keys]
