"""The vision-language-action network and its processor, the same for training, export and serving.

``config`` and ``processor`` need no torch; ``network`` does. Importing this package imports none.
"""
