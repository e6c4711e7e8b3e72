"""A user's own tasks: a folder of prompt sets, one JSON object a line, that stands where the synthetic suite does.

`Gpt.adapters.tools prepare` writes the folder: `train.jsonl` and `test.jsonl`, with lines

    {"task": "arc", "prompts": ["…", "…"], "answers": ["…", "…"]}

A set is what describes a task to the generator at once: its prompts, joined; no prompt is in two sets. `answers` are
what an adapter for the task should write after each. All sets have them or none: adapters for prompts without answers
cannot be trained here or tested, but imported ones are learnt from, and what is written is compared with them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random

from Gpt.adapters.suite import Example, Judgement, Member
from Gpt.errors import ConfigError, DataError
from Gpt.files import write_text
from Gpt.seeds import derive_seed

FILES = {"train": "train.jsonl", "test": "test.jsonl"}
ALL_OR_NONE = (
    "adapters are judged by the answers of all prompts, or, where no prompt has one, by their weights: add those that "
    "are missing, or prepare the samples without any (--answer-key none)"
)


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one task that are shown together, and their answers, unless the suite has none."""

    task: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptSuite:
    """A user's tasks, each a rule of its own in the format "plain"; the validation part is the training part's.

    Examples and prompt sets are drawn with replacement where more are asked for than there are.
    """

    sets: tuple[tuple[str, PromptSet], ...]

    @cached_property
    def members(self) -> tuple[Member, ...]:
        return tuple(Member(task, "plain") for task in dict.fromkeys(found.task for _, found in self.sets))

    @cached_property
    def answered(self) -> bool:
        """Whether the prompts have answers."""
        return all(found.answers for _, found in self.sets)

    def examples(self, member: Member, split: str, count: int, seed: int = 0) -> list[Example]:
        """Prompts with their answers.

        Raises:
            DataError: the task has no answers.
        """
        known = [
            (f"{prompt}\n", f"{answer}\n")
            for found in self._sets_of(member, split)
            for prompt, answer in zip(found.prompts, found.answers, strict=False)  # all have one, or none
        ]
        if not known:
            raise DataError(
                f"task {member.rule!r} has no answers that an adapter could be trained on or tested by; add the key "
                "'answer' to its samples"
            )
        return _drawn(known, count, derive_seed(seed, "examples", member.name, split))

    def instructed(self, member: Member, split: str, count: int, seed: int = 0) -> list[Example]:
        """The same as `examples`: a user's prompts state their task themselves, or nothing does."""
        return self.examples(member, split, count, seed)

    def condition_prompts(self, member: Member, split: str, count: int, seed: int = 0) -> list[str]:
        """The prompts of a set as one text."""
        joined = ["\n\n".join(found.prompts) for found in self._sets_of(member, split)]
        return _drawn(joined, count, derive_seed(seed, "conditions", member.name, split))

    def judge(self, member: Member, reply: str, expected: str) -> Judgement:
        """There is no format to speak of, so that a reply is right as a whole or not at all."""
        exact = reply.strip() == expected.strip()
        return Judgement(exact, exact, exact)

    def _sets_of(self, member: Member, split: str) -> list[PromptSet]:
        part = "test" if split == "test" else "train"
        found = [prompts for where, prompts in self.sets if where == part and prompts.task == member.rule]
        if not found:
            raise DataError(f"task {member.rule!r} has no prompt set in {FILES[part]}; prepare it with more prompts")
        return found


def is_prompt_folder(path: str) -> bool:
    return all((Path(path) / name).is_file() for name in FILES.values())


@lru_cache(maxsize=8)
def read_prompts(path: str) -> PromptSuite:
    """Raises:
    DataError: a line is not a prompt set, or has answers where the first has none, or the other way round; names file
        and line.
    """
    sets: list[tuple[str, PromptSet]] = []
    for part, name in FILES.items():
        text = (Path(path) / name).read_text(encoding="utf-8")
        for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
            try:
                fields = json.loads(line)
                found = PromptSet(fields["task"], tuple(fields["prompts"]), tuple(fields.get("answers", ())))
                if len(found.answers) not in (0, len(found.prompts)):
                    raise ValueError(f"{len(found.prompts)} prompts, but {len(found.answers)} answers")
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{Path(path) / name}, line {number} is not a prompt set ({error!r})") from error
            if sets and bool(found.answers) != bool(sets[0][1].answers):
                one, other = ("", "none") if found.answers else ("no ", "some")
                raise DataError(
                    f"{Path(path) / name}, line {number} (task {found.task!r}) has {one}answers, the first set has "
                    f"{other}; {ALL_OR_NONE}"
                )
            sets.append((part, found))
    return PromptSuite(tuple(sets))


def prepare_prompts(
    samples: Sequence[Mapping[str, str]], samples_per_prompt: int, test_ratio: float, seed: int = 0
) -> dict[str, list[PromptSet]]:
    """Sort samples, `{"task", "prompt"}` and maybe `"answer"`, into sets that share no prompt, to train and to test.

    A prompt that occurs again in a task is left out; the last set of a task may be smaller than the others.

    Args:
        samples: "place", where a sample is from, is for error messages alone.
        samples_per_prompt: prompts of a set.
        test_ratio: share of each task's sets that are for testing; at least one, and not all.

    Raises:
        ConfigError: a number is out of range.
        DataError: some samples have an answer and some have none, or a task has too few prompts for two sets.
    """
    if samples_per_prompt < 1:
        raise ConfigError(f"--samples-per-prompt {samples_per_prompt}: a set has at least one prompt")
    if not 0 < test_ratio < 1:
        raise ConfigError(f"--test-ratio {test_ratio}: a share of the sets is for testing; choose above 0 and below 1")
    _check_answers(samples)
    by_task: dict[str, dict[str, str | None]] = {}
    for sample in samples:
        by_task.setdefault(sample["task"], {}).setdefault(sample["prompt"], sample.get("answer"))
    parts: dict[str, list[PromptSet]] = {"train": [], "test": []}
    for task, answers in by_task.items():
        prompts = list(answers)
        Random(derive_seed(seed, "prompt sets", task)).shuffle(prompts)
        sets = []
        for first in range(0, len(prompts), samples_per_prompt):
            members = tuple(prompts[first : first + samples_per_prompt])
            replies = tuple(answer for prompt in members if (answer := answers[prompt]) is not None)
            sets.append(PromptSet(task, members, replies))
        if len(sets) < 2:
            raise DataError(
                f"task {task!r} has {len(prompts)} different prompts, too few for two sets of {samples_per_prompt}, "
                "one to train and one to test; lower --samples-per-prompt"
            )
        tests = min(max(1, round(test_ratio * len(sets))), len(sets) - 1)
        parts["test"] += sets[:tests]
        parts["train"] += sets[tests:]
    return parts


def _check_answers(samples: Sequence[Mapping[str, str]]) -> None:
    """Raises:
    DataError: some samples have an answer and some have none; names the first of either kind.
    """
    first: dict[bool, str] = {}
    for sample in samples:
        first.setdefault("answer" in sample, sample.get("place", f"the prompt {sample['prompt'][:60]!r}"))
    if len(first) == 2:
        raise DataError(f"{first[False]} has no answer, but {first[True]} has one; {ALL_OR_NONE}")


def write_prompts(folder: str | Path, parts: Mapping[str, Sequence[PromptSet]]) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part, name in FILES.items():
        lines = [json.dumps(asdict(found), ensure_ascii=False) for found in parts[part]]
        write_text(Path(folder) / name, "\n".join(lines) + "\n")


def _drawn(items: list, count: int, seed: int) -> list:
    draw = Random(seed)
    return draw.sample(items, count) if count <= len(items) else draw.choices(items, k=count)
