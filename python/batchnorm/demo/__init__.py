"""``python -m batchnorm demo``: what batch norm does to three small networks, measured claim by claim."""

from batchnorm.demo.command import add_arguments, run

__all__ = ["add_arguments", "run"]
