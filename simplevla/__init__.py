"""The words every part of simplevla shares: contracts, kinematics, and the ``simplevla`` command.

Importing this package, or any module directly below it, never imports torch, rclpy or sapien.
"""

__version__ = "0.1.0"
