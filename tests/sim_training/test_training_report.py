"""The report of a training run, what is kept of one, and the comparison of several."""

import base64
import html
import io
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from benchmarks.ablations import FULL, common_overrides, switches, variants
from benchmarks.ablations import main as ablations
from sim_training import run_folder
from sim_training.evaluation import BundleSource, EpisodeResult, Report, Share, save_report
from sim_training.generalisation import SPLITS, Generalisation, save_generalisation
from sim_training.history import HISTORY, Counted, Iteration, append_iteration, read_history, sampled_rates
from sim_training.progress import describe
from sim_training.report import duration, make_report
from sim_training.results import compare, keep, markdown_table, mean_interval
from sim_training.run_folder import Origin, StageEntry, note_stage
from sim_training.run_record import read_run
from sim_training.training import plan
from sim_training.training_config import load_config
from sim_training.videos import film_policies, side_by_side
from simplevla.cli import main
from simplevla.errors import ConfigError, RecordError
from simplevla.files import share_dir
from simplevla.intervals import wilson
from simplevla.trial import FailureCode, Strategy


def iteration(number: int, successes: int = 8, **changes: object) -> Iteration:
    fields: dict[str, object] = {
        "iteration": number,
        "sampled": Counted(
            episodes=32, successes=successes, strategies={"grasp": successes - 1, "push": 1}
        ),
        "groups": 4,
        "kept_groups": 3,
        "updated_groups": 3,
        "loss": -0.01,
        "entropy": 2.5,
        "ratio": 0.02,
        "clip_fraction": 0.1,
        "gradient_norm": 0.7,
        "learning_rate": 1e-4,
        "temperature": 1.2,
        "seconds": {"rollouts": 9.0, "update": 3.0},
        "elapsed_s": 12.0 * (number + 1),
    }
    return Iteration(**{**fields, **changes})  # type: ignore[arg-type]


def evaluation(wins: int, of: int = 20, seed: int = 10_000) -> Report:
    share = Share(*wilson(wins, of))
    return Report(
        policy_id="0" * 64,
        task="move_can_pot",
        embodiment="piper_dual",
        randomisation=(),
        seed=seed,
        success=share,
        pushcuts=Share(*wilson(1, of)),
        strategies={"grasp": wins - 1, "push": 1, "none": of - wins},
        failures={"time_limit": of - wins},
        mean_actions=41.5,
        regions={"left near": share},
        episodes=tuple(
            EpisodeResult(
                seed=seed + i,
                success=i < wins,
                failure=FailureCode.NONE if i < wins else FailureCode.TIME_LIMIT,
                strategy=Strategy.PUSH if i == 0 else Strategy.GRASP if i < wins else Strategy.NONE,
                actions=40,
            )
            for i in range(of)
        ),
    )


def write_run(folder: Path, *, before: int = 4, final: int = 17, iterations: int = 6) -> Path:
    """Write what a run leaves, but for the large files."""
    folder.mkdir(parents=True)
    config = {
        "name": "a <run>",
        "task": "move_can_pot",
        "embodiment": "piper_dual",
        "network": "tiny",
        "seed": 3,
    }
    (folder / run_folder.CONFIG).write_bytes(msgspec.json.encode(config))
    origin = Origin(started_ns=10**18, commit="c0ffee", version="0", machine="two cores")
    (folder / run_folder.ORIGIN).write_bytes(msgspec.json.encode(origin))
    note_stage(
        folder, StageEntry(stage="demonstrations", seconds=75.0, finished_ns=1, outcome="kept 5 of 5")
    )
    for number in range(iterations):
        greedy = Counted(episodes=20, successes=6 + number) if number % 2 else None
        append_iteration(
            folder / "grpo",
            iteration(
                number, 8 + number, greedy=greedy, regions={"left near": Counted(episodes=8, successes=2)}
            ),
        )
    save_report(evaluation(before), folder / run_folder.BEFORE)
    save_report(evaluation(final), folder / run_folder.EVALUATION)
    splits = Generalisation(seen=evaluation(18), unseen={"object": evaluation(7)})
    save_generalisation(splits, folder / SPLITS)
    (folder / "policy-0").mkdir()
    (folder / "policy-0/history.json").write_text('[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]')
    (folder / run_folder.VIDEOS).mkdir()
    (folder / run_folder.VIDEOS / "after.webp").write_bytes(film())
    (folder / "policy-0/checkpoint.safetensors").write_bytes(bytes(1000))
    return folder


def film() -> bytes:
    pictures = [np.full((24, 32, 3), shade, dtype=np.uint8) for shade in (0, 90, 180)]
    return side_by_side([(pictures, True), (pictures[:1], False), (pictures[:2], True)])


def test_the_report_shows_the_run_and_needs_no_other_file(tmp_path: Path) -> None:
    page = make_report(write_run(tmp_path / "run")).read_text()
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for words in (
        "a <run>", "17 / 20", "85.0 %, 95 % interval", "seeds 10000 to 10019",
        "+65.0 points by reinforcement learning, 4.2 times as often; the intervals do not overlap",
        "left near", "c0ffee", "6 iterations, 192 episodes sampled, 1 min 12 s", "push 1, grasp 16",
        "seed: 3", "unseen, object 7/20 = 35.0 %", "held-out ones are not new to it",
    ):  # fmt: skip
        assert words in " ".join(text.split()), words
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(sources) == 7
    assert all(source.startswith("data:image/") for source in sources)
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))).load()
    assert Image.open(tmp_path / "run" / run_folder.CURVE).width > 500


def test_the_report_of_a_run_that_has_just_begun_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / run_folder.CONFIG).write_text(
        '{"name": "new", "task": "t", "embodiment": "e", "network": "n", "seed": 0}'
    )
    page = make_report(tmp_path).read_text()
    assert "Not evaluated yet" in page
    assert "<img" not in page
    with pytest.raises(RecordError, match="no training run"):
        make_report(tmp_path / "absent")
    (tmp_path / run_folder.BEFORE).write_text("{")
    with pytest.raises(ConfigError, match=r"before\.json"):
        make_report(tmp_path)


def test_what_is_kept_gives_the_same_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = make_report(run).read_bytes()
    kept = tmp_path / "results/run"
    assert main(["train-report", str(run), "--keep", str(kept)]) == 0
    assert not list(kept.rglob("*.safetensors"))
    assert (kept / run_folder.REPORT).read_bytes() == page
    assert make_report(kept).read_bytes() == page
    with pytest.raises(ConfigError, match="exists"):
        keep(run, kept)
    (run / run_folder.VIDEOS / "after.webp").write_bytes(bytes(6_000_000))
    with pytest.raises(ConfigError, match="too many to keep"):
        keep(run, tmp_path / "results/other")
    assert not (tmp_path / "results/other").exists()


def test_the_history_survives_a_kill(tmp_path: Path) -> None:
    for number in range(4):
        append_iteration(tmp_path, iteration(number, 5))
    with (tmp_path / HISTORY).open("ab") as stream:
        stream.write(b'{"iteration": 4, "samp')
    # It goes on from the checkpoint before iteration 2, and what was written of 2 and 3 is void.
    append_iteration(tmp_path, iteration(2, 9))
    assert [(it.iteration, it.sampled.successes) for it in read_history(tmp_path)] == [
        (0, 5),
        (1, 5),
        (2, 9),
    ]
    with (tmp_path / HISTORY).open("ab") as stream:
        stream.write(b'{"iteration": "three"}\n')
    with pytest.raises(RecordError, match="line 7"):
        read_history(tmp_path)
    assert read_history(tmp_path / "absent") == []


def test_an_iteration_of_groups_that_had_waited_says_nothing_new(tmp_path: Path) -> None:
    nothing = Counted(episodes=0, successes=0)
    history = [iteration(0, 8), iteration(1, 16), iteration(2, 0, sampled=nothing), iteration(3, 24)]
    assert sampled_rates(history) == [0.25, 0.5, 0.5, 0.75]
    assert sampled_rates([iteration(0, 0, sampled=nothing)]) == [0.0]
    run = write_run(tmp_path / "run")
    (run / run_folder.GRPO / HISTORY).unlink()
    for each in history:
        append_iteration(run / run_folder.GRPO, each)
    assert compare({"waits": [run]})[0].sampled == (0.5,)  # 48 of 96


def test_runs_are_compared_over_seeds(tmp_path: Path) -> None:
    full = [write_run(tmp_path / f"full/{seed}", final=final) for seed, final in enumerate((16, 18, 17))]
    off = [write_run(tmp_path / "off/0", final=5)]
    (write_run(tmp_path / "off/1") / run_folder.EVALUATION).unlink()
    rows = compare({"full": full, "off": [*off, tmp_path / "off/1"]})
    assert rows[0].finals == (0.8, 0.9, 0.85)
    assert (rows[1].unfinished, rows[1].episodes, rows[1].seconds) == (1, 192, 72)
    # Student's t with two degrees of freedom, 4.303, times 5 % / sqrt(3).
    assert mean_interval(rows[0].finals) == pytest.approx((0.85, 0.85 - 0.1242, 0.85 + 0.1242), abs=1e-4)
    table = markdown_table(rows)
    assert "| full | 3 | 80.0, 90.0, 85.0 | **85.0** (72.6-97.4) | 34.4 | 192 | 1 |" in table
    assert "| off | 1 (+1 unfinished) | 25.0 | **25.0** (11.2-46.9) |" in table
    assert "same 20 initial states that no training used; before, 20.0 %" in table
    save_report(evaluation(5, seed=11_000), off[0] / run_folder.EVALUATION)
    with pytest.raises(ConfigError, match="different episodes"):
        compare({"full": full, "off": off})


def test_ablations_take_one_part_away_and_are_kept_as_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = share_dir() / "config/training/move_can_pot.yaml"
    common = common_overrides(Path("bundles/move_can_pot"), 3, ["evaluation.episodes=7"])
    changes = ["grpo={iterations: 2, sampling: {temperature: 1.6}}", "pictures={}", *common]
    config = load_config(path, changes)
    assert config.grpo is not None
    assert (config.grpo.iterations, config.evaluation.episodes) == (3, 7)
    assert [stage.name for stage in plan(config)][:2] == ["evaluation before", "reinforcement learning"]
    listed = variants(load_config(path, changes))
    assert list(listed) == [FULL, "dynamic-sampling-off", "clip-higher-off", "temperature-1.0"]
    for overrides in listed.values():
        changed = load_config(path, [*changes, *overrides])
        assert (changed != load_config(path, changes)) == bool(overrides)
    beyond = switches(load_config(path, changes))
    assert {"loss-gspo", "loss-cispo", "surplus-token", "epochs-4", "randomised"} <= beyond.keys()
    different = {repr(load_config(path, [*changes, *overrides])) for overrides in beyond.values()}
    assert len(different) == len(beyond)
    for name in (FULL, "clip-higher-off"):
        for seed in (0, 1):
            write_run(tmp_path / f"runs/{name}/seed-{seed}")
    assert ablations(["--out", str(tmp_path / "runs"), "--keep", str(tmp_path / "kept")]) == 0
    printed = capsys.readouterr().out
    assert printed.index(FULL) < printed.index("clip-higher-off")
    assert (tmp_path / "kept/table.md").read_text() in printed
    assert read_run(tmp_path / f"kept/{FULL}/seed-1").history
    assert ablations(["--out", str(tmp_path / "nothing")]) == 2


def test_an_iteration_is_one_line() -> None:
    line = describe(iteration(11, greedy=Counted(episodes=64, successes=32)), 80)
    assert line.startswith("iteration 12 of 80: sampled 8/32 = 25 %, greedy 32/64 = 50.0 % (95 % interval")
    assert "kept 3/4 groups" in line
    assert line.endswith(", 144 s so far")
    assert [duration(s) for s in (8, 72, 3725)] == ["8 s", "1 min 12 s", "1 h 02 min"]


def test_a_film_shows_what_the_policy_saw(tmp_path: Path) -> None:
    source = BundleSource(share_dir() / "bundles/move_can_pot")
    film_policies({"after": source}, "move_can_pot", [10_000], tmp_path / "videos")
    sheet = Image.open(tmp_path / "videos/after.webp")
    assert 4 < sheet.n_frames < 42  # type: ignore[attr-defined]
    colours = np.asarray(sheet.convert("RGB"))[3:-3, 3:-3].reshape(-1, 3)
    assert colours.std(axis=0).min() > 10
    with pytest.raises(FileExistsError):
        film_policies({}, "move_can_pot", [], tmp_path / "videos")


def test_episodes_are_shown_side_by_side_in_the_colour_of_their_end() -> None:
    sheet = Image.open(io.BytesIO(film()))
    assert (sheet.n_frames, sheet.size) == (3, (492, 372))  # type: ignore[attr-defined]
    sheet.seek(2)
    last = np.asarray(sheet.convert("RGB")).astype(int)
    top_left, top_right = last[1, 100], last[1, 350]
    assert top_left[1] > top_left[0] + 40  # green: it succeeded
    assert top_right[0] > top_right[1] + 40  # red: it failed
