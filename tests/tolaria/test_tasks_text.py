from __future__ import annotations

import re
import urllib.error
import urllib.request

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from esper.leyline.errors import DataError, SpecError
from esper.leyline.task_specs import TinyStoriesTask
from esper.tolaria.tasks import load_task
from esper.tolaria.tasks.stories import embedded_story
from esper.tolaria.tasks.text import END_OF_STORY, UNKNOWN, load_tinystories_task, tokenize

SMALL = TinyStoriesTask(context=16, rows=(40, 10, 12), val_rows_per_epoch=4)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_DATA", str(tmp_path))
    monkeypatch.setenv("ESPER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def from_file(path="stories.txt", **changes):
    return TinyStoriesTask(**{"source": "file", "path": path, "context": 4, "rows": (6, 2, 2), **changes})


def made_up(count, first=0):
    """Stories of six words, each with two words that no other story has."""
    return [f"Tom saw a{i} cat b{i} ." for i in range(first, first + count)]


def test_rows_are_windows_whose_labels_are_the_next_tokens():
    task = load_task(SMALL)
    for split, rows in ((task.train, 40), (task.val, 10), (task.test, 12)):
        assert split.inputs.shape == split.labels.shape == (rows, 16)
        assert split.inputs.dtype == split.labels.dtype == torch.int64
        assert torch.equal(split.inputs[:, 1:], split.labels[:, :-1])
        assert torch.equal(split.inputs[1:, 0], split.labels[:-1, -1])
    assert torch.equal(task.val_epoch.inputs, task.val.inputs[:4])
    assert int(task.train.inputs.max()) < task.shape.num_classes
    assert (task.shape.kind, task.shape.resolution) == ("text", 16)


def test_embedded_stories_are_said_to_be_generated_and_the_same_spec_gives_the_same_bytes():
    task = load_task(SMALL)
    assert "generated" in task.source
    assert "not TinyStories" in task.source
    assert load_tinystories_task(SMALL).digest == task.digest


def test_embedded_stories_are_grammatical_distinct_and_independent_of_each_other():
    stories = [embedded_story(index) for index in range(500)]
    assert len(set(stories)) == 500
    assert embedded_story(123) == stories[123]
    for story in stories:
        assert "{" not in story
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", story)
        hero = re.search(r"named (\w+)\.", story)[1]
        assert re.search(rf"At the end, {hero} was", story)
        assert all(start.isupper() for start in re.findall(r'\. "?(\w)', story))


def test_chance_is_what_guessing_the_commonest_next_token_scores():
    task = load_task(SMALL)
    scores = [float((task.train.labels == token).float().mean()) for token in range(task.shape.num_classes)]
    assert task.chance == pytest.approx(max(scores))


def test_splits_hold_other_stories_and_the_vocabulary_is_the_training_stories_alone(data):
    (data / "stories.txt").write_text("\n\n".join(made_up(40)))
    task = load_task(from_file())
    words = task.shape.num_classes - 2
    in_training = len(set(task.train.inputs.flatten().tolist()) - {UNKNOWN, END_OF_STORY})
    assert in_training <= words
    for split in (task.val, task.test):
        # words of one story each are unknown elsewhere; the five shared ones are known
        assert (split.inputs == UNKNOWN).sum() >= 2
        assert len(set(split.inputs.flatten().tolist()) - {UNKNOWN, END_OF_STORY}) <= 4
    assert (task.train.inputs != UNKNOWN).all()


def test_the_vocabulary_keeps_the_commonest_words(data):
    (data / "stories.txt").write_text("\n\n".join(made_up(200)))
    task = load_task(from_file(context=14, rows=(20, 2, 2), vocabulary=16))
    assert task.shape.num_classes == 16
    assert (task.train.inputs == UNKNOWN).any()
    assert all((task.train.inputs == token).sum() >= 20 for token in (2, 3, 4, 5))


def test_stories_end_at_the_mark_or_at_blank_lines_and_repeated_ones_are_read_once(data):
    stories = made_up(30)
    (data / "blank.txt").write_text("\n \n".join(stories))
    (data / "mark.txt").write_text("\n<|endoftext|>\n".join(s.replace(" cat", "\n\ncat") for s in stories))
    (data / "twice.txt").write_text("\ufeff" + "\n\n\n".join(s for story in stories for s in (story, story)))
    pq.write_table(pa.table({"text": stories}), data / "table.parquet")
    tasks = [load_task(from_file(name)) for name in ("blank.txt", "mark.txt", "twice.txt", "table.parquet")]
    assert len({task.digest for task in tasks}) == 1
    assert [task.source for task in tasks][0::3] == ["text blank.txt", "text table.parquet (Parquet)"]


def test_words_keep_their_apostrophes_and_marks_stand_alone():
    assert tokenize('"Don\'t go," said Ana.') == ('"', "Don't", "go", ",", '"', "said", "Ana", ".")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("stories.txt", None, "'stories.txt' not found\n  looked for: .*stories.txt"),
        ("stories.txt", b"", "0 tokens in 0 distinct stories\n  expected: at least "),
        ("stories.txt", "\n\n".join(made_up(5)).encode(), "35 tokens in 5 distinct stories"),
        ("stories.txt", b"fine\n\ncaf\xe9 au lait\n", r"line 3 of .*stories.txt: byte 3 \(0xe9\) is not UTF-8"),
        ("stories.parquet", b"no", "cannot be read as Parquet"),
        ("stories.parquet", {"story": ["a"]}, "no column 'text'\n  its columns: story"),
        ("stories.parquet", {"text": ["a", None]}, "row 1 of .*None is no text"),
        ("stories.parquet", {"text": [3]}, "row 0 of .*3 is no text"),
    ],
)
def test_text_that_is_no_task_is_refused(data, name, content, words):
    if isinstance(content, dict):
        pq.write_table(pa.table(content), data / name)
    elif content is not None:
        (data / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_task(from_file(name))


def test_text_in_a_table_that_is_not_utf8_names_its_row(data):
    raw = pa.array([b"fine", b"caf\xe9"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": text}), data / "bad.parquet")
    with pytest.raises(DataError, match=r"row 1 of .*not UTF-8"):
        load_task(from_file("bad.parquet"))


def test_a_download_without_a_network_says_what_to_do(data, monkeypatch):
    def offline(*_args, **_kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match="no network in this test") as caught:
        load_task(TinyStoriesTask(source="download", context=4, rows=(6, 2, 2)))
    assert "TinyStories-valid.txt" in str(caught.value)
    assert "embedded" in str(caught.value)
    assert list((data / "cache" / "tinystories").iterdir()) == []


def test_a_downloaded_file_is_read_from_the_cache_without_a_network(data, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", None)
    (data / "cache" / "tinystories").mkdir(parents=True)
    (data / "cache" / "tinystories" / "TinyStories-valid.txt").write_text("<|endoftext|>".join(made_up(30)))
    task = load_task(TinyStoriesTask(source="download", context=4, rows=(6, 2, 2)))
    assert task.source == "TinyStories (validation file, downloaded)"


def test_a_path_belongs_to_the_source_file_alone():
    with pytest.raises(SpecError, match="source 'embedded' and path"):
        TinyStoriesTask.parse({"path": "x.txt"})
