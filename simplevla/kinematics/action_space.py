"""The one place where a policy's actions become joint targets, and joint targets actions.

An action has D values, in the order of the embodiment's vector: arm by arm. The value of an arm's
gripper is its absolute opening (m) in every space; the six or more before it are, in the space

- ``joint_absolute``: the joints' targets, rad;
- ``joint_delta``: the joints' change, rad;
- ``ee_delta``: the tool's change: translation (3, m) and rotation vector (3, rad), both in the arm's
  base frame, the rotation applied from the left (R_new = exp(v) R_old). Needs arms of six joints.

A change is relative to the target before it, the first to the measured state.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simplevla.bundle import ActionSpaceName
from simplevla.embodiment import Arm, Embodiment
from simplevla.errors import EmbodimentError
from simplevla.kinematics.chain import Chain, arm_chain
from simplevla.kinematics.inverse import Array, Limits, Pose, nearest_reach, rotation_vector, times, turn

_FAR_M = 10.0  # nothing within reach lies beyond; larger values only lose digits
_MANY_RAD = 1e3


def to_joint_targets(
    space: ActionSpaceName, actions: ArrayLike, state: ArrayLike, embodiment: Embodiment
) -> NDArray[np.float32]:
    """Return the absolute joint targets (K, D) that ``actions`` mean; rad and m, within the limits.

    A tool pose out of reach gives the nearest joints found, position before rotation; what follows
    it is relative to the pose really targeted, so that nothing winds up.

    Args:
        space: what the actions are.
        actions: (K, D) finite values.
        state: (D,) finite measured position that the first action starts from; rad and m.
        embodiment: the robot.

    Raises:
        EmbodimentError: a shape is wrong, a value is not finite, or the space does not fit the arms.
    """
    values, start = _checked(space, actions, state, embodiment, what="actions")
    lower, upper = embodiment.position_limits()
    if space == "ee_delta":
        wanted = _poses_followed(values, start, embodiment)
    elif space == "joint_delta":
        wanted = _changes_followed(values, start, embodiment)
    else:
        wanted = values
    return _float32_within(wanted, lower, upper)


def from_joint_targets(
    space: ActionSpaceName, targets: ArrayLike, state: ArrayLike, embodiment: Embodiment
) -> NDArray[np.float64]:
    """Return the actions (K, D) that lead from ``state`` over the joint ``targets``.

    Undoes :func:`to_joint_targets` where that had no limit to keep.

    Args:
        space: what the actions shall be.
        targets: (K, D) finite absolute targets; rad and m.
        state: (D,) finite measured position that the first action starts from; rad and m.
        embodiment: the robot.

    Raises:
        EmbodimentError: a shape is wrong, a value is not finite, or the space does not fit the arms.
    """
    values, start = _checked(space, targets, state, embodiment, what="targets")
    actions = values.copy()
    if space == "joint_absolute":
        return actions
    before = np.vstack([start, values])[:-1]
    for arm, part in embodiment.slices():
        joints = _joints(part)
        if space == "joint_delta":
            actions[:, joints] = values[:, joints] - before[:, joints]
            continue
        chain = arm_chain(arm)
        poses = [chain.forward(q) for q in np.vstack([start, values])[:, joints]]
        for action, old, new in zip(actions, poses[:-1], poses[1:], strict=True):
            action[joints] = _pose_change(old, new)
    return actions


def tool_poses(state: ArrayLike, embodiment: Embodiment) -> dict[str, Array]:
    """Return {arm: (4, 4) pose of its tool in its base frame, m} at the ``state`` (D,).

    Raises:
        EmbodimentError: the shape is wrong.
    """
    position = np.asarray(state, dtype=np.float64)
    if position.shape != (embodiment.dimension,):
        raise _wrong_shape("state", position.shape, embodiment)
    return {arm.name: arm_chain(arm).forward(position[_joints(part)]) for arm, part in embodiment.slices()}


def _changes_followed(actions: Array, state: Array, embodiment: Embodiment) -> Array:
    lower, upper = embodiment.position_limits()
    absolute = _grippers(embodiment)
    targets = np.empty_like(actions)
    before = state
    for target, action in zip(targets, actions, strict=True):
        target[:] = np.clip(np.where(absolute, action, before + action), lower, upper)
        before = target
    return targets


def _poses_followed(actions: Array, state: Array, embodiment: Embodiment) -> Array:
    targets = actions.copy()
    for arm, part in embodiment.slices():
        joints = _joints(part)
        targets[:, joints] = _arm_followed(arm_chain(arm), arm, actions[:, joints], state[joints])
    return targets


def _arm_followed(chain: Chain, arm: Arm, changes: Array, start: Array) -> Array:
    """Return (K, n) joints whose tool poses differ by ``changes`` (K, 6), beginning at ``start`` (n,)."""
    linkage = chain.linkage
    limits = Limits([joint.lower_rad for joint in arm.joints], [joint.upper_rad for joint in arm.joints])
    before = linkage.at(start.tolist())
    within = linkage.at(limits.clip(before.q))
    followed = []
    for change in changes:
        within = before = nearest_reach(linkage, _changed(before.tool, change), within, limits).place
        followed.append(before.q)
    return np.array(followed).reshape(changes.shape)


def _changed(pose: Pose, change: Array) -> Pose:
    x, y, z = np.clip(change[:3], -_FAR_M, _FAR_M).tolist()
    turned = list(times(turn(np.clip(change[3:], -_MANY_RAD, _MANY_RAD).tolist()), pose))
    turned[3::4] = pose[3] + x, pose[7] + y, pose[11] + z
    return tuple(turned)


def _pose_change(old: Array, new: Array) -> Array:
    return np.concatenate([new[:3, 3] - old[:3, 3], rotation_vector(new[:3, :3] @ old[:3, :3].T)])


def _joints(part: slice) -> slice:
    return slice(part.start, part.stop - 1)


def _grippers(embodiment: Embodiment) -> NDArray[np.bool_]:
    mask = np.zeros(embodiment.dimension, dtype=bool)
    mask[[part.stop - 1 for _, part in embodiment.slices()]] = True
    return mask


def _float32_within(values: Array, lower: Array, upper: Array) -> NDArray[np.float32]:
    """Return ``values`` as float32 that is within the limits even after rounding."""
    low, high = lower.astype(np.float32), upper.astype(np.float32)
    low = np.where(low < lower, np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high > upper, np.nextafter(high, np.float32(-np.inf)), high)
    return np.clip(np.clip(values, lower, upper).astype(np.float32), low, high)


def _checked(
    space: str, values: ArrayLike, state: ArrayLike, embodiment: Embodiment, *, what: str
) -> tuple[Array, Array]:
    if space not in get_args(ActionSpaceName):
        raise EmbodimentError(
            f"unknown action space {space!r}", f"choose one of: {', '.join(get_args(ActionSpaceName))}"
        )
    if space == "ee_delta" and any(len(arm.joints) != 6 for arm in embodiment.arms):
        raise EmbodimentError(
            f"ee_delta needs arms of six joints, and {embodiment.name} has others", "use joint_delta"
        )
    rows, start = (np.asarray(values, dtype=np.float64), np.asarray(state, dtype=np.float64))
    if rows.ndim != 2 or rows.shape[1] != embodiment.dimension:
        raise _wrong_shape(what, rows.shape, embodiment)
    if start.shape != (embodiment.dimension,):
        raise _wrong_shape("state", start.shape, embodiment)
    if not (np.isfinite(rows).all() and np.isfinite(start).all()):
        raise EmbodimentError(f"{what} or state are not finite", "check the policy and the joint feedback")
    return rows, start


def _wrong_shape(what: str, shape: tuple[int, ...], embodiment: Embodiment) -> EmbodimentError:
    want = f"({embodiment.dimension},)" if what == "state" else f"(K, {embodiment.dimension})"
    return EmbodimentError(
        f"{what} {'has' if what == 'state' else 'have'} shape {shape}, not {want}",
        f"give values in the order of {embodiment.name}",
    )
