"""The results file: what a kill, a bad disk or a second process can do to it."""

import json
import os
import subprocess
import sys

import pytest

from foveate.ops.errors import InputError
from foveate.runs.records import FILE, Records, digest


def fill(folder, count=3):
    with Records(folder) as records:
        for i in range(count):
            records.add(digest(i), {"pass": i}, {"seconds": i / 3})


def test_what_was_added_is_found_again(tmp_path):
    fill(tmp_path)
    with Records(tmp_path) as records:
        assert len(records) == 3
        assert records.get(digest(2)) == {"seconds": 2 / 3}
        assert records.get(digest(3)) is None
        assert digest(0) in records


def test_a_cut_off_last_line_is_put_aside_and_the_rest_stays(tmp_path):
    fill(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    for cut in (1, 20, len(whole.splitlines()[-1])):
        (tmp_path / FILE).write_bytes(whole[:-cut])
        with Records(tmp_path) as records:
            assert len(records) == 2
            assert len(records.notes) == 1
            records.add(digest(2), {"pass": 2}, {"seconds": 2 / 3})
        assert (tmp_path / FILE).read_bytes() == whole
    kept = sorted(p.name for p in tmp_path.glob("results.unfinished-*.jsonl"))
    assert kept == ["results.unfinished-1.jsonl", "results.unfinished-2.jsonl",
                    "results.unfinished-3.jsonl"]  # fmt: skip


@pytest.mark.parametrize(
    "damage", [b"{not json\n", b"\x00\xff\xfe\n", b'{"schema": 99}\n', b"[]\n", b"\n"]
)
def test_a_damaged_line_is_an_error_and_nothing_is_lost(tmp_path, damage):
    fill(tmp_path)
    first, *rest = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    broken = first + damage + b"".join(rest)
    (tmp_path / FILE).write_bytes(broken)
    with pytest.raises(InputError, match=r"line 2 is damaged .*results.corrupt-1.jsonl"):
        Records(tmp_path)
    assert (tmp_path / "results.corrupt-1.jsonl").read_bytes() == broken
    with Records(tmp_path) as records:
        assert len(records) == 3


def test_damaged_files_never_overwrite_each_other(tmp_path):
    for number in (1, 2):
        (tmp_path / FILE).write_bytes(b"broken %d\n" % number)
        with pytest.raises(InputError):
            Records(tmp_path)
    for number in (1, 2):
        kept = tmp_path / f"results.corrupt-{number}.jsonl"
        assert kept.read_bytes() == b"broken %d\n" % number


def test_fresh_puts_earlier_results_aside(tmp_path):
    fill(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    with Records(tmp_path, fresh=True) as records:
        assert len(records) == 0
    assert (tmp_path / "results.old-1.jsonl").read_bytes() == before


def test_two_writers_are_refused(tmp_path):
    pytest.importorskip("fcntl")
    with Records(tmp_path), pytest.raises(InputError, match="Another foveate command"):
        Records(tmp_path)
    Records(tmp_path).close()


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        Records(tmp_path / "file")
    with pytest.raises(InputError, match="lies under a file"):
        Records(tmp_path / "file" / "below")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(InputError, match="can't be written"):
            Records(tmp_path / "closed")


def test_a_record_is_a_line_and_not_a_number_is_refused(tmp_path):
    fill(tmp_path)
    lines = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(line)["cell"] for line in lines] == [{"pass": i} for i in range(3)]
    with Records(tmp_path) as records, pytest.raises(ValueError, match="JSON compliant"):
        records.add("x", {}, {"seconds": float("nan")})
    assert len((tmp_path / FILE).read_text().splitlines()) == 3


FULL = """
import resource, signal, sys
from pathlib import Path
from foveate.ops.errors import InputError
from foveate.runs.records import Records

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails
with Records(Path(sys.argv[1])) as records:
    records.add("a", {"n": 1}, {"x": 1.0})
    size = records.path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, resource.RLIM_INFINITY))
    try:
        records.add("b", {"n": 2}, {"x": "y" * 1000})
    except InputError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    records.add("c", {"n": 3}, {"x": 3.0})
"""


def test_a_full_disk_is_named_and_loses_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "a result can't be written (File too large). The 1 before it are kept" in done.stdout
    with Records(tmp_path) as records:
        assert records.notes == []
        assert [key in records for key in "abc"] == [True, False, True]
