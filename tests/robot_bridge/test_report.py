"""The report: shows what is in the recordings, survives what is not, and trusts no name."""

import html.parser
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from robot_bridge.latency import ChunkTrace, one_line, split, summarise
from robot_bridge.recording import TrialRecorder, read_recording, trial_topics
from robot_bridge.report import joints_figure, latency_figure, make_report, simulated_rate
from simplevla.embodiment import load_embodiment
from simplevla.errors import RecordError
from simplevla.trial import (
    FailureCode,
    LatencySplit,
    Outcome,
    RunInfo,
    Strategy,
    Trial,
    TrialIndex,
    save_index,
)

EMBODIMENT = load_embodiment("piper_dual")
START_NS = 1_790_000_000_000_000_000
HOSTILE = "<script>alert('x')</script>"


def run_info(**changes) -> RunInfo:
    values = {
        "task": "move_can_pot", "instruction": "move the can next to the pot", "rig": "twin",
        "embodiment": "piper_dual", "operator": "nobody", "policy_name": "tiny", "policy_id": "ab" * 32,
        "policy_commit": "0123abc", "demonstrations": 300, "backend": "onnxruntime", "step_limit": 200,
        "started_ns": START_NS, "version": "0.1.0",
        "evaluation": {"success": {"successes": 71, "trials": 100}},
    }  # fmt: skip
    return RunInfo(**{**values, **changes})


def trial(number: int, outcome: Outcome = Outcome.SUCCESS, **changes) -> Trial:
    success = outcome is Outcome.SUCCESS
    values = {
        "id": f"trial_{number:03d}", "task": "move_can_pot", "rig": "twin", "embodiment": "piper_dual",
        "policy_id": "ab" * 32, "instruction": "move the can next to the pot", "seed": 100 + number,
        "operator": "nobody", "started_ns": START_NS, "duration_s": 12.3, "actions": 110,
        "outcome": outcome, "failure": FailureCode.NONE if success else FailureCode.TIME_LIMIT,
        "strategy": Strategy.GRASP if success else Strategy.NONE, "limits": {"velocity": 3},
        "real_time_factor": 0.99, "latency": None, "recording": f"trial_{number:03d}",
    }  # fmt: skip
    return Trial(**{**values, **changes})


def record(folder: Path, name: str, seconds: float = 6.0) -> None:
    """Write a recording of both arms swinging, as a trial would leave it."""
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_KILTED)
    kinds = store.types
    time_type, header_type = kinds["builtin_interfaces/msg/Time"], kinds["std_msgs/msg/Header"]

    def header(stamp_ns: int):
        return header_type(time_type(stamp_ns // 10**9, stamp_ns % 10**9), "")

    def send(topic: str, kind: str, stamp_ns: int, *values) -> None:
        message = kinds[kind](header(stamp_ns), *values)
        recorder.write(topic, bytes(store.serialize_cdr(message, kind)), stamp_ns)

    def tell(topic: str, stamp_ns: int, values: dict[str, object]) -> None:
        pair = kinds["diagnostic_msgs/msg/KeyValue"]
        status = kinds["diagnostic_msgs/msg/DiagnosticStatus"](
            0, topic, "", "", [pair(key, str(value)) for key, value in values.items()]
        )
        send(topic, "diagnostic_msgs/msg/DiagnosticArray", stamp_ns, [status])

    names, empty = EMBODIMENT.names(), np.zeros(0)
    with TrialRecorder(folder, name, trial_topics(EMBODIMENT)) as recorder:
        for step in range(int(50 * seconds)):
            now = START_NS + step * 20_000_000
            swing = 0.3 * np.sin(step / 40 + np.arange(len(names)))
            wanted = EMBODIMENT.home() + swing * np.where(["gripper" in n for n in names], 0.05, 1)
            send("setpoints", "sensor_msgs/msg/JointState", now, names, wanted, empty, empty)
            send("joint_states", "sensor_msgs/msg/JointState", now, names, 0.97 * wanted, empty, empty)
        for step in range(int(15 * seconds)):
            picture = np.full((240, 320, 3), 200, np.uint8)
            cv2.circle(picture, (20 + 3 * step, 120), 18, (40, 90, 200), -1)
            jpeg = np.frombuffer(cv2.imencode(".jpg", picture)[1], np.uint8)
            now = START_NS + step * 66_666_667
            topic = "head/color/image_raw/compressed"
            send(topic, "sensor_msgs/msg/CompressedImage", now, "jpeg", jpeg)
        for index in range(int(2 * seconds)):
            now = START_NS + index * 500_000_000
            request, reply = now + 20_000_000, now + (90 + index) * 1_000_000
            asked = {"capture_ns": now, "request_ns": request, "reply_ns": reply}
            tell("policy/chunks", now, {"index": index, "inference_ms": 55.0, **asked})
            tell("arms/executed", now, {"first_setpoint_ns": reply + 4_000_000, "executed": 5})


class Links(html.parser.HTMLParser):
    """Collects what a page refers to, and refuses markup that does not nest."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value for key, value in attrs if key in {"src", "href"}]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page: Path) -> Links:
    links = Links()
    links.feed(page.read_text(encoding="utf-8"))
    assert links.open == []
    return links


def test_report_shows_every_trial_and_every_link_leads_somewhere(tmp_path):
    latency = LatencySplit(
        capture_to_request_ms=20, request_to_reply_ms=75, inference_ms=55, reply_to_bus_ms=4, total_ms=99
    )
    trials = (trial(0, latency=latency), trial(1, Outcome.FAILURE, real_time_factor=0.71))
    for one in trials:
        record(tmp_path, one.recording)
    save_index(TrialIndex(trials=trials, run=run_info()), tmp_path)

    page = make_report(tmp_path)

    text = page.read_text(encoding="utf-8")
    for expected in (
        "1 / 2", "95 % interval", "71 / 100", "21.0 points lower", "did not keep real time", "0.71",
        "time_limit", "capture to request", "inference", "55.0 ms", "ab" * 32, "300", "onnxruntime",
    ):  # fmt: skip
        assert expected in text, expected
    links = [link for link in parsed(page).links if not link.startswith("#")]
    assert len(links) >= 10
    for link in links:
        assert (tmp_path / link).is_file(), link
    with Image.open(tmp_path / "media/trial_000.webp") as video:
        assert video.n_frames == 90
    with Image.open(tmp_path / "media/trial_000_0_sheet.jpg") as sheet:
        assert sheet.width > 5 * 320
    assert make_report(tmp_path) == page


def test_an_empty_run_has_a_report(tmp_path):
    save_index(TrialIndex(), tmp_path)
    page = make_report(tmp_path)
    assert "No trial was made" in page.read_text()
    parsed(page)


def test_a_trial_without_a_usable_recording_says_why(tmp_path):
    record(tmp_path, "trial_002", 1.0)
    bag = tmp_path / "trial_002" / "trial_002.mcap"
    bag.write_bytes(bag.read_bytes()[:500])
    trials = (
        trial(0, Outcome.ERROR, recording=""),
        trial(1, Outcome.ERROR, recording="../../etc"),
        trial(2),
        trial(3, Outcome.FAILURE),
    )
    save_index(TrialIndex(trials=trials, run=run_info(evaluation={})), tmp_path)
    page = make_report(tmp_path)
    text = page.read_text()
    assert text.count("Nothing to show") == 4
    assert "is damaged" in text
    assert "does not exist" in text
    assert "none in the bundle" in text
    parsed(page)


def test_a_recording_that_heard_nothing_is_shown_as_such(tmp_path):
    with TrialRecorder(tmp_path, "trial_000", trial_topics(EMBODIMENT)):
        pass
    save_index(TrialIndex(trials=(trial(0),), run=run_info()), tmp_path)
    page = make_report(tmp_path)
    assert "No chunk reached the bus" in page.read_text()
    parsed(page)


def test_names_with_markup_stay_text(tmp_path):
    hostile = trial(0, id=HOSTILE, note=HOSTILE, limits={HOSTILE: 2}, operator=HOSTILE, recording=HOSTILE)
    run = run_info(policy_name=HOSTILE, instruction=HOSTILE, rig=HOSTILE, backend=HOSTILE, task=HOSTILE)
    save_index(TrialIndex(trials=(hostile,), run=run), tmp_path)
    links = parsed(make_report(tmp_path))
    assert "script" not in links.tags


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RecordError, match="cannot be read"):
        make_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_figures_hold_the_recorded_values(tmp_path):
    record(tmp_path, "t", 2.0)
    recording = read_recording(tmp_path / "t")
    figure = joints_figure(recording)
    assert len(figure.axes) == EMBODIMENT.dimension
    commanded, measured = figure.axes[0].lines
    np.testing.assert_allclose(measured.get_ydata(), 0.97 * commanded.get_ydata(), atol=1e-12)
    bars = latency_figure([trace(0, 10, 30, 60, bus_ms=70), trace(1, 10, 30, 60)], "t").axes[0].patches
    assert [round(bar.get_height(), 6) for bar in bars] == [20, 10, 20, 10]


def trace(
    index: int, *times_ms: float, inference_ms: float = 20, bus_ms: float | None = None
) -> ChunkTrace:
    """Return a chunk captured, requested and answered at ``times_ms``."""
    times = [START_NS + round(ms * 1e6) for ms in times_ms]
    bus_ns = None if bus_ms is None else START_NS + round(bus_ms * 1e6)
    return ChunkTrace(index, *times, inference_ms, bus_ns, executed=5)


def test_latency_split_adds_up():
    traces = [
        trace(0, 0, 10, 60, inference_ms=40, bus_ms=65),
        trace(1, 0, 12, 70, inference_ms=50, bus_ms=80),
        trace(2, 0, 14, 60),
    ]
    found = split(traces)
    assert found is not None
    assert found.capture_to_request_ms == pytest.approx(11)
    assert found.request_to_reply_ms == pytest.approx(54)
    assert found.inference_ms == pytest.approx(45)
    assert found.reply_to_bus_ms == pytest.approx(7.5)
    assert found.total_ms == pytest.approx(72.5)
    legs = {leg.name: leg for leg in summarise(traces)}
    assert legs["wire and processing"].median_ms == pytest.approx(9)
    assert legs["total"].p95_ms == pytest.approx(79.25)
    assert "72.5 ms in all" in one_line(traces)


def test_latency_of_no_chunk_is_nothing():
    assert split([]) is None
    assert summarise([trace(0, 0, 1, 2)]) == []
    assert one_line([]) == "no chunk reached the bus"


@pytest.mark.parametrize(
    "share", [None, 3, {"successes": 3}, {"successes": "3", "trials": 5}, {"successes": 6, "trials": 5}]
)
def test_an_evaluation_without_figures_is_no_rate(share):
    assert simulated_rate({"success": share}) is None
