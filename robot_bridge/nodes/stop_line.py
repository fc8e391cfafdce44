"""The emergency stop's own way in: a node, an executor and a thread beside the one whose arms it stops.

A callback of the main executor that takes long, or a transition that hangs, delays nothing here. It is
there as long as the arms' drivers are open, in every lifecycle state that has them open.

================  ===========================================================================
``<node>/estop``  std_srvs/Trigger; answers when the stop was sent to every arm
``estop``         std_msgs/Bool: true stops, false does nothing. Whatever the publisher's
                  quality of service is, it is heard
================  ===========================================================================
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import Bool
from std_srvs.srv import Trigger

from simplevla.errors import SimplevlaError


@contextmanager
def stop_line(arms: Node, stop: Callable[[], str]) -> Iterator[None]:
    """Offer the service and hear the topic while the block runs.

    Args:
        arms: the node in whose names it is done.
        stop: stops the arms; returns what a person is told, or raises why it was not done. It must be safe
            in a thread of its own, and quick.
    """
    node = Node(
        f"{arms.get_name()}_estop",
        namespace=arms.get_namespace(),
        context=arms.context,
        use_global_arguments=False,  # they may rename the arms' node; names are resolved by that one
        start_parameter_services=False,
    )

    def serve(_: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            response.message, response.success = stop(), True
        except SimplevlaError as error:
            response.message, response.success = str(error), False
        return response

    def hear(message: Bool) -> None:
        if message.data:
            serve(Trigger.Request(), Trigger.Response())

    node.create_service(Trigger, arms.resolve_service_name("~/estop"), serve)
    for reliability in (ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT):
        profile = QoSProfile(depth=10, reliability=reliability)
        node.create_subscription(Bool, arms.resolve_topic_name("estop"), hear, profile)
    executor = SingleThreadedExecutor(context=arms.context)
    executor.add_node(node)
    thread = threading.Thread(target=executor.spin, name="estop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        executor.shutdown(timeout_sec=2)
        thread.join(2)
        node.destroy_node()
