"""How often a process may be started again."""

from robot_bridge.respawn import Respawns


def test_three_times_in_two_minutes_and_no_more():
    now = [0.0]
    respawns = Respawns(lambda: now[0])
    allowed = []
    for now[0] in (0.0, 10.0, 20.0, 30.0, 119.0, 121.0, 122.0, 131.0):
        allowed.append((now[0], respawns.allowed()))
    assert [t for t, yes in allowed if yes] == [0.0, 10.0, 20.0, 121.0, 131.0]
