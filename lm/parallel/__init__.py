"""What devices exchange beyond what a constraint can say."""

from lm.parallel.dealing import deal

__all__ = ["deal"]
