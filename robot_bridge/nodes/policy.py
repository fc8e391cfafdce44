"""The policy's node: the cameras and the policy server's client in one process.

Frames of the control path stay in this process; what goes over DDS is for people and recordings.

=========================  ==================================================================
subscribes                 ``joint_states``, ``arms/executed``
publishes                  ``joint_trajectory`` (what of an answer is to be played),
                           ``policy/answers`` (the whole answer) and ``policy/chunks`` (its times and
                           its policy), both keyed by the trajectory's stamp, ``policy/state``
                           (on change and at 2 Hz), ``<camera>/color/image_raw/compressed``,
                           ``<camera>/color/camera_info``, where the cameras stand
                           (:mod:`robot_bridge.nodes.transforms`)
services, std_srvs/Trigger  ``~/start``, ``~/stop``
parameters set by a trial  ``instruction``, ``episode``, ``step_limit``
=========================  ==================================================================
"""

from __future__ import annotations

import array
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, CompressedImage, JointState
from std_msgs.msg import Header
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from policy_server.client import PolicyClient, ServerInfo, keys_for
from policy_server.protocol import DEFAULT_ADDRESS
from robot_bridge.drivers.choice import camera_driver
from robot_bridge.drivers.realsense import Frame, RealSenseDriver
from robot_bridge.execution_modes import MAX_HORIZON, Execution, ExecutionMode
from robot_bridge.nodes.process import (
    declare,
    declare_record,
    destroying,
    diagnostics,
    run_node,
    set_stamp,
    stamp_ns,
    status,
    trigger,
)
from robot_bridge.nodes.transforms import publish_transforms
from robot_bridge.policy_loop import (
    EpisodeState,
    JointTimeline,
    Phase,
    PlayedChunk,
    PlayedCounts,
    PolicyLoop,
    Request,
)
from robot_bridge.rig import load_rig
from simplevla.cli import require_choice
from simplevla.embodiment import Camera, Embodiment
from simplevla.errors import ConfigError, SimplevlaError
from simplevla.motion import FOLLOWING_DELAY_S
from simplevla.session_record import Lens, SessionRecord, calibrated, to_pose

logger = logging.getLogger(__name__)

_STEP_LIMIT = 200
_MAX_STEPS = 100_000
_STATE_PERIOD_S = 0.05
_REPEAT_STATE_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the node until it is asked to end; return the exit status."""
    return run_node("policy", open_policy, sys.argv if argv is None else argv)


@contextmanager
def open_policy() -> Iterator[PolicyNode]:
    """Yield the node, connected to its server and with its cameras streaming."""
    node = PolicyNode()
    with destroying(node), ExitStack() as resources:
        rig = load_rig(node.rig_name)
        embodiment = rig.load_embodiment()
        client = resources.enter_context(
            PolicyClient(
                node.server,
                embodiment=embodiment,
                timeout_s=node.server_timeout_s,
                wait_s=node.server_wait_s,
                keys=keys_for(node.server),
            )
        )
        needed = [need.name for need in client.info.cameras]
        if node.task:
            require_choice("task", node.task, sorted(client.info.instructions))
        streams = choose_cameras(embodiment, node.cameras, needed)
        cameras = {
            camera.name: resources.enter_context(camera_driver(rig, camera, node.record))
            for camera in streams
        }
        placed = calibrated(embodiment, node.record)
        publish_transforms(node, {c.frame: to_pose(placed.camera(c.name).pose_in_world()) for c in streams})
        loop = PolicyLoop(
            client,
            {name: cameras[name] for name in needed},
            node.joints,
            node.played,
            node.publish_chunk,
            execution=replace(node.execution, settle_s=settle_s(node.record, embodiment)),
            timeout_s=node.input_timeout_s,
        )
        node.attach(embodiment, client.info, loop)
        resources.enter_context(loop)
        for driver in cameras.values():
            resources.enter_context(node.publishing(driver))
        yield node


def choose_cameras(embodiment: Embodiment, wanted: Sequence[str], needed: Sequence[str]) -> list[Camera]:
    """Return the cameras to start: those wanted, or all, which must include those the policy needs.

    Raises:
        ConfigError: one is missing or unknown.
    """
    known = [camera.name for camera in embodiment.cameras]
    names = list(wanted) or known
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown camera {name!r}", f"choose from: {', '.join(known)}")
    for name in needed:
        if name not in names:
            raise ConfigError(f"the policy needs camera {name!r}, which is left out", "start that camera")
    return [embodiment.camera(name) for name in names]


class PolicyNode(Node):
    """ROS's view of a :class:`~robot_bridge.policy_loop.PolicyLoop` and of the cameras."""

    def __init__(self) -> None:
        super().__init__("policy")
        self.rig_name: str = declare(
            self, "rig", "twin", "name of a rig in config/rig, or a path to a .yaml file"
        )
        self.server: str = declare(self, "server", DEFAULT_ADDRESS, "address of the policy server")
        self.server_timeout_s: float = declare(
            self, "server_timeout_s", 2.0, "longest wait for an answer, s", low=0.05, high=60
        )
        self.server_wait_s: float = declare(
            self, "server_wait_s", 30.0, "how long the start waits for the server, s", low=0, high=600
        )
        self.task: str = declare(
            self, "task", "", "task whose instruction is the default; empty: the only one"
        )
        cameras: str = declare(
            self, "cameras", "", "names of the cameras to start, by commas; empty for all"
        )
        self.cameras = [name for name in cameras.replace(" ", "").split(",") if name]
        self.input_timeout_s: float = declare(
            self,
            "input_timeout_s",
            1.0,
            "longest wait for a picture or joint feedback, s",
            low=0.05,
            high=10,
        )
        self.record = declare_record(self)
        self.execution = _declare_execution(self)
        self._jpeg_quality: int = declare(
            self, "jpeg_quality", 90, "quality of the published pictures, percent", low=1, high=100
        )
        declare(self, "instruction", "", "what to do, in words; empty: as the task has it", changing=True)
        declare(self, "episode", "", "name of the next episode", changing=True)
        declare(
            self,
            "step_limit",
            _STEP_LIMIT,
            "actions at most in an episode",
            low=1,
            high=_MAX_STEPS,
            changing=True,
        )
        self.joints = JointTimeline()
        self.played = PlayedCounts()
        self._trajectories = self.create_publisher(JointTrajectory, "joint_trajectory", 10)
        self._answers = self.create_publisher(JointTrajectory, "policy/answers", 10)
        self._chunks = self.create_publisher(DiagnosticArray, "policy/chunks", 50)
        self._states = self.create_publisher(DiagnosticArray, "policy/state", 10)
        self._said: tuple[EpisodeState, float] = (EpisodeState(), 0.0)

    def attach(self, embodiment: Embodiment, info: ServerInfo, loop: PolicyLoop) -> None:
        """Take up work for ``loop``: from now on feedback and services reach it."""
        self._names = embodiment.names()
        self._info = info
        self._loop = loop
        self.create_subscription(JointState, "joint_states", self._take_joints, 10)
        self.create_subscription(DiagnosticArray, "arms/executed", self._take_executed, 50)
        self.create_timer(_STATE_PERIOD_S, self._publish_state)
        trigger(self, "~/start", self._start)
        trigger(self, "~/stop", self._stop)

    def publish_chunk(self, chunk: PlayedChunk) -> None:
        """Hand a chunk to the arms, and tell what it is; in the episode's thread."""
        hand, answer = chunk.hand, chunk.reply.chunk
        self._trajectories.publish(self._trajectory(hand.targets, hand.dt_s, hand.start_ns))
        publish_ns = time.time_ns()
        self._answers.publish(self._trajectory(answer.actions, answer.dt_s, hand.start_ns))
        capture_ns = chunk.reply.chunk.capture_ns
        timing = chunk.reply.timing
        values = {
            "index": chunk.index,
            "first_action": hand.first,
            "actions": len(hand.targets),
            "asked": chunk.asked,
            "committed": chunk.committed,
            "held": hand.held,
            "policy_id": chunk.reply.chunk.policy_id,
            "capture_ns": capture_ns,
            "request_ns": chunk.request_ns,
            "reply_ns": chunk.reply_ns,
            "publish_ns": publish_ns,
            "inference_ms": f"{timing.inference_ms:.3f}",
            "capture_to_request_ms": f"{(chunk.request_ns - capture_ns) / 1e6:.3f}",
            "request_to_reply_ms": f"{(chunk.reply_ns - chunk.request_ns) / 1e6:.3f}",
            "reply_to_publish_ms": f"{(publish_ns - chunk.reply_ns) / 1e6:.3f}",
        }
        self._chunks.publish(diagnostics(hand.start_ns, status("chunk", "", values)))

    def _trajectory(self, targets: NDArray[np.float32], dt_s: float, stamp: int) -> JointTrajectory:
        message = JointTrajectory(joint_names=self._names)
        set_stamp(message.header.stamp, stamp)
        dt_ns = round(dt_s * 1e9)
        for i, target in enumerate(targets):
            point = JointTrajectoryPoint(positions=target.astype(np.float64).tolist())
            set_stamp(point.time_from_start, (i + 1) * dt_ns)
            message.points.append(point)
        return message

    @contextmanager
    def publishing(self, driver: RealSenseDriver) -> Iterator[None]:
        """Publish a camera's pictures as JPEG while the block runs."""
        camera = driver.camera
        images = self.create_publisher(
            CompressedImage, f"{camera.name}/color/image_raw/compressed", qos_profile_sensor_data
        )
        infos = self.create_publisher(
            CameraInfo, f"{camera.name}/color/camera_info", qos_profile_sensor_data
        )
        info = camera_info(camera, self.record.lenses.get(camera.name) if self.record else None)
        closing = threading.Event()

        def publish() -> None:
            newest_ns = 0
            while not closing.is_set():
                try:
                    frame = driver.wait_newer(newest_ns, 0.5)
                except SimplevlaError as error:
                    logger.debug("%s", error)
                    continue
                newest_ns = frame.capture_ns
                images.publish(compressed_image(frame, camera.frame, self._jpeg_quality))
                set_stamp(info.header.stamp, frame.capture_ns)
                infos.publish(info)

        thread = threading.Thread(target=publish, name=f"publish-{camera.name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            closing.set()
            thread.join()

    def _take_joints(self, message: JointState) -> None:
        if list(message.name) == self._names and len(message.position) == len(self._names):
            self.joints.add(stamp_ns(message.header.stamp), np.array(message.position))

    def _take_executed(self, message: DiagnosticArray) -> None:
        for each in message.status:
            values = {pair.key: pair.value for pair in each.values}
            if values.get("executed", "").isdigit() and values.get("at_ns", "").isdigit():
                self.played.add(
                    stamp_ns(message.header.stamp), int(values["executed"]), int(values["at_ns"])
                )

    def _publish_state(self) -> None:
        now, state = time.monotonic(), self._loop.state
        if state == self._said[0] and now - self._said[1] < _REPEAT_STATE_S:
            return
        self._said = (state, now)
        values = {
            "phase": state.phase.value,
            "episode": state.episode,
            "actions": state.actions,
            "failure": state.failure.value,
            "reason": state.reason,
            "policy_id": self._info.policy_id,
        }
        level = "error" if state.phase is Phase.FAILED else "ok"
        self._states.publish(
            diagnostics(time.time_ns(), status("policy", state.reason, values, level=level))
        )

    def _start(self) -> str:
        instruction = self.get_parameter("instruction").value or self._task_instruction()
        request = Request(
            instruction, self.get_parameter("episode").value, self.get_parameter("step_limit").value
        )
        self._loop.start(request)
        return f"running: {instruction}"

    def _stop(self) -> str:
        self._loop.stop()
        return f"stopped after {self._loop.state.actions} actions"

    def _task_instruction(self) -> str:
        known = self._info.instructions
        if self.task:
            return known[self.task]
        if len(known) != 1:
            raise ConfigError("no instruction is set", f"set one, such as: {'; '.join(known.values())}")
        return next(iter(known.values()))


def _declare_execution(node: Node) -> Execution:
    """Declare how chunks become motion and return it.

    Raises:
        ConfigError: there is no such mode, or it has no horizon.
    """
    modes = [mode.value for mode in ExecutionMode]
    mode: str = declare(
        node,
        "execution",
        modes[0],
        f"how chunks become motion: {', '.join(modes)} (docs/chunk_execution.md)",
    )
    horizon: int = declare(
        node,
        "horizon",
        0,
        "new actions of an answer to be played, receding or in real time; 0: as the mode has it",
        low=0,
        high=MAX_HORIZON,
    )
    max_age_s: float = declare(
        node, "max_age_s", 2.0, "an answer to an older observation is refused, s", low=0.05, high=60
    )
    lead_s: float = declare(
        node, "lead_s", 0.005, "how far ahead of now a trajectory starts, s", low=0, high=1
    )
    require_choice("execution", mode, modes)
    return Execution(ExecutionMode(mode), horizon, max_age_s, lead_s)


def compressed_image(frame: Frame, frame_id: str, quality: int) -> CompressedImage:
    """Return a frame as a JPEG message."""
    return CompressedImage(
        header=_header(frame.capture_ns, frame_id), format="jpeg", data=_jpeg(frame.image, quality)
    )


def settle_s(record: SessionRecord | None, embodiment: Embodiment) -> float:
    """Return how much later than simulated arms the measured ones reach a setpoint, s."""
    measured = record.command_delay_s(embodiment) if record else 0.0
    return max(0.0, measured - FOLLOWING_DELAY_S)


def camera_info(camera: Camera, measured: Lens | None = None) -> CameraInfo:
    """Return the camera as a message without a stamp: as measured, else the nominal pinhole.

    ROS counts pixels from the middle of the first one, an embodiment from its corner.
    """
    lens = (
        measured.scaled(camera.width, camera.height)
        if measured
        else Lens(
            width=camera.width, height=camera.height, fx=camera.fx, fy=camera.fy, cx=camera.cx, cy=camera.cy
        )
    )
    cx, cy = lens.cx - 0.5, lens.cy - 0.5
    info = CameraInfo(header=_header(0, camera.frame), width=camera.width, height=camera.height)
    info.distortion_model = "plumb_bob"
    info.d = list(lens.distortion)
    info.k = [lens.fx, 0.0, cx, 0.0, lens.fy, cy, 0.0, 0.0, 1.0]
    info.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    info.p = [lens.fx, 0.0, cx, 0.0, 0.0, lens.fy, cy, 0.0, 0.0, 0.0, 1.0, 0.0]
    return info


def _header(capture_ns: int, frame_id: str) -> Header:
    header = Header(frame_id=frame_id)
    set_stamp(header.stamp, capture_ns)
    return header


def _jpeg(image: NDArray[np.uint8], quality: int) -> array.array[int]:
    done, encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
    )
    if not done:
        raise ConfigError(f"an image of shape {image.shape} could not be encoded", "check the camera")
    data = array.array("B")  # what rclpy takes without walking through every byte
    data.frombytes(encoded.tobytes())
    return data


if __name__ == "__main__":
    sys.exit(main())
