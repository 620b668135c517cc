"""Next-token prediction on stories: one token per word or mark, splits of disjoint stories."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from esper.kasmina.hosts import DataShape
from esper.leyline.errors import DataError
from esper.leyline.keys import numpy_generator
from esper.leyline.task_specs import TinyStoriesTask
from esper.tolaria.tasks.split import Split, TaskData, content_digest
from esper.tolaria.tasks.story_sources import open_stories

UNKNOWN, END_OF_STORY = 0, 1
RESERVED = 2
"""Tokens that are no words."""

_TOKEN = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
Story = tuple[str, ...]


def load_tinystories_task(task: TinyStoriesTask) -> TaskData:
    """Return the data of a task.

    As many stories are read as the rows need, each only once; a keyed order of them fills test, then validation, then
    training. The vocabulary is the commonest words of the training stories alone. Rows of a split follow each other
    in its stories: the last label of a row is the first token of the next.

    Raises:
        DataError: The text is missing, no text, or too short.
    """
    stories, source = open_stories(task)
    collected = _collect(stories, task, source)
    order = numpy_generator("tinystories-split").permutation(len(collected))
    shuffled = iter([collected[index] for index in order])
    train_rows, val_rows, test_rows = task.rows
    test, val, train = (_take(shuffled, rows * task.context + 1) for rows in (test_rows, val_rows, train_rows))
    words = _vocabulary(train, task.vocabulary)
    splits = [_split(part, words, rows, task.context) for part, rows in zip((train, val, test), task.rows)]
    frequency = torch.bincount(splits[0].labels.flatten())
    return TaskData(
        train=splits[0],
        val=splits[1],
        val_epoch=splits[1] if task.val_rows_per_epoch is None else splits[1].first(task.val_rows_per_epoch),
        test=splits[2],
        shape=DataShape(kind="text", channels=1, resolution=task.context, num_classes=RESERVED + len(words)),
        source=source,
        digest=content_digest(*splits),
        chance=float(frequency.max() / frequency.sum()),
    )


def tokenize(text: str) -> Story:
    """Return the words and marks of a text."""
    return tuple(_TOKEN.findall(text))


def _collect(stories: Iterator[str], task: TinyStoriesTask, source: str) -> list[Story]:
    """Distinct stories, until no way of dealing them out to the splits can run dry."""
    needed = sum(rows * task.context + 1 for rows in task.rows)
    seen: set[Story] = set()
    collected: list[Story] = []
    tokens = longest = 0
    for text in stories:
        story = tokenize(text)
        if not story or story in seen:
            continue
        seen.add(story)
        collected.append(story)
        tokens += len(story) + 1
        longest = max(longest, len(story) + 1)
        # every split may end within a story, whose rest is lost
        if tokens >= needed + (len(task.rows) - 1) * longest:
            return collected
    spare = (len(task.rows) - 1) * longest
    raise DataError(
        f"{source} holds {tokens:,} tokens in {len(collected):,} distinct stories\n"
        f"  expected: at least {needed + spare:,} for rows {task.rows} of {task.context} tokens\n"
        "  ask for fewer rows or a shorter context"
    )


def _take(stories: Iterator[Story], num_tokens: int) -> list[Story]:
    taken: list[Story] = []
    while num_tokens > 0:
        taken.append(next(stories))
        num_tokens -= len(taken[-1]) + 1
    return taken


def _vocabulary(stories: Sequence[Story], size: int) -> dict[str, int]:
    """The commonest words, ties in the order of the alphabet, with their tokens."""
    counts = Counter(word for story in stories for word in story)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: size - RESERVED]
    return {word: token for token, word in enumerate(ranked, start=RESERVED)}


def _split(stories: Sequence[Story], words: dict[str, int], rows: int, context: int) -> Split:
    stream: list[int] = []
    for story in stories:
        stream += [words.get(word, UNKNOWN) for word in story]
        stream.append(END_OF_STORY)
    tokens = torch.from_numpy(np.array(stream[: rows * context + 1], dtype=np.int64))
    return Split(inputs=tokens[:-1].view(rows, context), labels=tokens[1:].view(rows, context).contiguous())
