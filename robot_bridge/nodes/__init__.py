"""The ROS 2 nodes. Each is a process of its own: ``python -m robot_bridge.nodes.<name>``."""
