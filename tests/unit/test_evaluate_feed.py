"""Benchmarks as requests: lm-eval's tasks on local data, and what becomes of their requests."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_eval.api.instance import Instance
from PIL import Image

from jobs.evaluate.answers import Answer, Answers
from jobs.evaluate.config import TaskSection
from jobs.evaluate.data import find_split, read_dataset
from jobs.evaluate.feed import Feed, Request
from jobs.evaluate.feed_lm import FeedLM
from jobs.evaluate.harness import Benchmark, load
from pipeline.errors import ConfigError, InputError
from pipeline.model import ModelSpec, PromptFormat, load_prompt_format
from pipeline.openai_input import Endpoint, read_line
from tests import quiz

CONTEXT = 300
BOS = 256


@pytest.fixture(scope="module")
def prompts() -> PromptFormat:
    """One token per byte, and a BOS."""
    return load_prompt_format(ModelSpec("cluster/models/mini-maverick", None, CONTEXT))


class Taker:
    """Takes requests in, and gives the same answer to all."""

    def __init__(self, *texts: str | None, logprobs: Sequence[tuple[float, int]] = ()) -> None:
        self.requests: list[Request] = []
        self.wanted: list[int] = []
        self._texts = texts or ("",)
        self._logprobs = logprobs

    def __call__(self, request: Request, last_tokens: int) -> Answer:
        self.requests.append(request)
        self.wanted.append(last_tokens)
        return Answer(self._texts, self._logprobs[:last_tokens] if self._logprobs else None)

    @property
    def bodies(self) -> list[Any]:
        return [request.body for request in self.requests]


def generation(context: str, repeats: int = 1, **parameters: Any) -> Instance:
    return Instance("generate_until", {}, (context, parameters), 0, ("t", 7, repeats))


def likelihood(context: str, continuation: str) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0, ("t", 3, 1))


def test_a_generation_is_a_raw_prompt_of_tokens_with_the_tasks_parameters(
    prompts: PromptFormat,
) -> None:
    taker = Taker("4\n\nQuestion: next")
    lm = FeedLM(prompts, taker)
    given = generation("2+2=", until=["Question:"], max_gen_toks=9, do_sample=False)
    assert lm.generate_until([given]) == ["4\n\n"]
    assert taker.bodies == [
        {
            "prompt": [BOS, *b"2+2="],
            "temperature": 0.0,
            "stop": ["Question:"],
            "max_completion_tokens": 9,
        }
    ]
    assert lm.asked == {("t", 7): [taker.requests[0].custom_id]}


def test_a_chat_that_begins_with_bos_gets_no_second_one(prompts: PromptFormat) -> None:
    taker = Taker()
    lm = FeedLM(prompts, taker)
    text = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    lm.generate_until([generation(text)])
    tokens = taker.bodies[0]["prompt"]
    assert tokens == prompts.tokenize([{"role": "user", "content": "Hi"}])
    assert tokens.count(BOS) == 1


def test_stops_beyond_four_are_cut_from_the_answer(prompts: PromptFormat) -> None:
    taker = Taker("one|two#three")
    lm = FeedLM(prompts, taker)
    assert lm.generate_until([generation("x", until=["a1", "b2", "c3", "d4", "#", "|"])]) == ["one"]
    assert taker.bodies[0]["stop"] == ["a1", "b2", "c3", "d4"]


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0.4}, 0.4),
        ({"do_sample": True}, 1.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
    ],
)
def test_sampling_is_what_lm_eval_means_by_it(
    prompts: PromptFormat, given: dict[str, Any], temperature: float
) -> None:
    taker = Taker()
    FeedLM(prompts, taker).generate_until([generation("x", **given)])
    assert taker.bodies[0]["temperature"] == temperature


def test_repeats_are_samples_of_one_request_unless_greedy(prompts: PromptFormat) -> None:
    taker = Taker("a", "b", "c")
    sampled = generation("x", repeats=3, do_sample=True, temperature=0.5)
    assert FeedLM(prompts, taker).generate_until([sampled] * 3) == ["a", "b", "c"]
    assert [body["n"] for body in taker.bodies] == [3]
    greedy = generation("x", repeats=3)
    assert FeedLM(prompts, Taker("a")).generate_until([greedy] * 3) == ["a"] * 3


def test_an_unknown_generation_parameter_is_refused(prompts: PromptFormat) -> None:
    with pytest.raises(ConfigError, match="task t: generation parameter 'num_beams'"):
        FeedLM(prompts, Taker()).generate_until([generation("x", num_beams=4)])


def test_a_likelihood_asks_for_the_prompts_last_tokens(prompts: PromptFormat) -> None:
    taker = Taker("!", logprobs=[(-0.5, 1), (-0.25, 1), (-1.0, 2)])
    lm = FeedLM(prompts, taker)
    found = lm.loglikelihood([likelihood("2+2= ", "4"), likelihood("a", "bcd")])
    assert found == [(-0.75, True), (-1.75, False)]
    assert taker.wanted == [2, 3]  # blanks at the context's end belong to the continuation
    assert taker.bodies[0] == {
        "prompt": [BOS, *b"2+2= 4"],
        "max_completion_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": True,
    }


def test_a_likelihood_without_context_follows_bos(prompts: PromptFormat) -> None:
    taker = Taker("!", logprobs=[(-1.0, 1)] * 2)
    FeedLM(prompts, taker).loglikelihood([likelihood("", "ab")])
    assert taker.bodies[0]["prompt"] == [BOS, *b"ab"]


def test_what_is_too_long_loses_its_start_and_is_counted(prompts: PromptFormat) -> None:
    taker = Taker()
    lm = FeedLM(prompts, taker)
    lm.generate_until([generation("x" * CONTEXT + "end", max_gen_toks=100)])
    lm.loglikelihood([likelihood("y" * CONTEXT, "end")])
    assert [len(body["prompt"]) for body in taker.bodies] == [CONTEXT - 100, CONTEXT - 1]
    assert all(body["prompt"][-3:] == list(b"end") for body in taker.bodies)
    assert lm.truncated["t"] == 2
    with pytest.raises(ConfigError, match="leave no room for a prompt"):
        lm.generate_until([generation("x", max_gen_toks=CONTEXT)])


def test_requests_without_an_answer_are_counted_and_never_right(prompts: PromptFormat) -> None:
    lm = FeedLM(prompts, Taker(None))
    assert lm.generate_until([generation("x")]) == [""]
    assert lm.loglikelihood([likelihood("x", "y")]) == [(-math.inf, False)]
    assert lm.unanswered["t"] == 2


def test_whole_documents_are_refused(prompts: PromptFormat) -> None:
    with pytest.raises(ConfigError, match="perplexity"):
        FeedLM(prompts, Taker()).loglikelihood_rolling([likelihood("x", "y")])


def test_images_stand_in_the_chat_where_the_task_marks_them(prompts: PromptFormat) -> None:
    taker = Taker()
    lm = FeedLM(prompts, taker)
    lm.chat_as_messages = True
    image = Image.new("L", (3, 2), 77)
    chat = lm.apply_chat_template([{"role": "user", "content": "See <image>: which?"}])
    instance = Instance("generate_until", {}, (chat, {}, {"visual": [image]}), 0, ("t", 0, 1))
    lm.generate_until([instance])
    (request,) = taker.requests
    before, part, after = request.body["messages"][0]["content"]
    assert (before["text"], after["text"]) == ("See ", ": which?")
    data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).tobytes() == bytes([77] * 6)
    assert read_line(request.line().rstrip()).request(()).chat.images == (data,)
    for marks, images in (("", [image]), ("<image>", [])):
        bad = json.dumps([{"role": "user", "content": marks}])
        with pytest.raises(ConfigError, match="image"):
            lm.generate_until(
                [Instance("generate_until", {}, (bad, {}, {"visual": images}), 0, ("t", 0, 1))]
            )


def test_equal_requests_stand_in_the_feed_once(tmp_path: Path) -> None:
    feed = Feed()
    for prompt in ([1], [2], [1]):
        feed.add(Request(Endpoint.COMPLETIONS, {"prompt": prompt, "temperature": 0}))
    feed.add(Request(Endpoint.COMPLETIONS, {"temperature": 0, "prompt": [2]}))
    assert (feed.asked, len(feed), feed.saved) == (4, 2, 2)
    uri = feed.uri(str(tmp_path))
    feed.write(uri)
    lines = [json.loads(line) for line in Path(uri).read_text().splitlines()]
    assert [line["body"]["prompt"] for line in lines] == [[1], [2]]
    assert len({line["custom_id"] for line in lines}) == 2
    written = Path(uri).stat()
    feed.write(uri)  # a resumed run must find the very same object
    assert Path(uri).stat() == written
    feed.add(Request(Endpoint.CHAT, {"messages": []}))
    assert feed.uri(str(tmp_path)) != uri


def test_answers_are_found_by_request_and_sample() -> None:
    request = Request(Endpoint.COMPLETIONS, {"prompt": [1, 2, 3], "n": 2})
    other = Request(Endpoint.COMPLETIONS, {"prompt": [9]})
    places = [None, {"token_id": 2, "logprob": -0.5, "rank": 1}]
    places.append({"token_id": 3, "logprob": -2.0, "rank": 4})
    records = pa.table(
        {
            "custom_id": [request.custom_id, request.custom_id, other.custom_id],
            "sample_index": [1, 0, 0],
            "status": ["succeeded", "succeeded", "errored"],
            "text": ["second", "first", "cut"],
            "prompt_logprobs": [None, places, None],
        }
    )
    answers = Answers(records)
    assert answers.get(request, 0) == Answer(["first", "second"])
    assert answers.get(request, 2).prompt_logprobs == [(-0.5, 1), (-2.0, 4)]
    assert answers.get(request, 1).prompt_logprobs == [(-2.0, 4)]
    assert answers.get(other, 1) == Answer([None])


@pytest.mark.parametrize(
    ("layout", "subset"),
    [
        ("main/test-00000-of-00001.parquet", "main"),
        ("data/test-00000-of-00001.parquet", None),
        ("test.parquet", "main"),
        ("main/test/0000.parquet", "main"),
        ("test.jsonl", None),
        ("test.jsonl.gz", "default"),
    ],
)
def test_published_layouts_are_found(tmp_path: Path, layout: str, subset: str | None) -> None:
    path = tmp_path / layout
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    (tmp_path / "testimony.parquet").write_bytes(b"x")
    other = tmp_path / "other" / "test-0.parquet"
    other.parent.mkdir()
    other.write_bytes(b"x")
    assert find_split(str(tmp_path), subset, "test", is_main=True) == [path.as_uri()]
    assert find_split(str(tmp_path), subset, "train", is_main=False) == []


def test_files_of_a_split_are_one_data_set(tmp_path: Path) -> None:
    for number in range(2):
        rows = pa.table({"question": [f"q{number}"], "n": [number]})
        pq.write_table(rows, tmp_path / f"test-{number}.parquet")
    found = read_dataset(find_split(str(tmp_path), None, "test", is_main=True))
    assert found["question"][:] == ["q0", "q1"]
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(InputError, match=r"bad\.jsonl: cannot be read"):
        read_dataset([str(tmp_path / "bad.jsonl")])


def asked(benchmark: Benchmark, prompts: PromptFormat) -> list[str]:
    """The prompts of a benchmark as text."""
    taker = Taker()
    benchmark.ask(FeedLM(prompts, taker))
    return [bytes(i for i in body["prompt"] if i < BOS).decode() for body in taker.bodies]


@pytest.fixture(scope="module")
def long_prompts() -> PromptFormat:
    return load_prompt_format(ModelSpec("cluster/models/mini-maverick", None, 4096))


def test_examples_and_questions_are_lm_evals_and_the_same_each_time(
    tmp_path: Path, long_prompts: PromptFormat
) -> None:
    quiz.write_gsm8k(tmp_path)
    benchmark = load(TaskSection(name="gsm8k", data=str(tmp_path), num_fewshot=2, limit=3))
    first = asked(benchmark, long_prompts)
    assert len(first) == 3
    assert all(text.count("Question:") == 3 and text.endswith("Answer:") for text in first)
    assert asked(benchmark, long_prompts) == first
    again = load(TaskSection(name="gsm8k", data=str(tmp_path), num_fewshot=2, limit=3))
    assert asked(again, long_prompts) == first


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_missing_data_are_named_with_their_layout(tmp_path: Path) -> None:
    quiz.write_gsm8k(tmp_path / "only")
    train = tmp_path / "only" / "main" / "train-00000-of-00001.parquet"
    train = train.rename(_folder(tmp_path / "trained") / train.name).parent
    with pytest.raises(ConfigError, match=r"data is missing.*openai/gsm8k"):
        load(TaskSection(name="gsm8k"))
    with pytest.raises(InputError, match=r"has no rows for split 'test' of subset 'main'.*gsm8k"):
        load(TaskSection(name="gsm8k", data=str(train)))
    with pytest.raises(ConfigError, match="worked examples are wanted, but split 'train'"):
        load(TaskSection(name="gsm8k", data=str(tmp_path / "only")))
    assert load(TaskSection(name="gsm8k", data=str(tmp_path / "only"), num_fewshot=0)).tasks
    with pytest.raises(InputError, match=r"is tasks\.data right"):
        load(TaskSection(name="gsm8k", data=str(tmp_path / "nowhere")))


def test_data_with_other_columns_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["?"]}), tmp_path / "test.parquet")
    with pytest.raises(ConfigError, match=r"task gsm8k: the data in .* lack what the task reads"):
        load(TaskSection(name="gsm8k", data=str(tmp_path), num_fewshot=0))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "digist"}, "no task 'digist'; did you mean 'digits'"),
        ({"name": "digits"}, "has images, which want chat: true"),
        ({"name": "digits", "chat": True, "subject": "color"}, "no column of the data"),
    ],
)
def test_what_does_not_fit_a_task_is_refused(
    prompts: PromptFormat, section: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load(TaskSection(**section)).ask(FeedLM(prompts, Taker()))


def test_the_digits_are_the_held_out_ones(long_prompts: PromptFormat) -> None:
    from cluster.models.digits import Split, digits
    from jobs.evaluate.tasks.digits import make

    assert pq.read_table(make.OUT).equals(make.table())
    taker = Taker()
    load(TaskSection(name="digits", chat=True)).ask(FeedLM(long_prompts, taker))
    assert len(taker.requests) == len(digits(Split.HELD_OUT)) == 397
    assert all(request.endpoint is Endpoint.CHAT for request in taker.requests)
