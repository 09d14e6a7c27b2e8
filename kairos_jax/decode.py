"""A decode instance in a process of its own, to which routers attach.

  kairos decode --config=smollm2_135m_cpu --port=50071

See kairos_jax/role.py for how it starts and ends, and for its exit codes.
"""

from kairos_jax import role
from kairos_jax.process import launch
from schedulers.ledger.instance import Role


def main(argv: list[str]) -> None:
    """Serves, and ends the process."""
    role.main(Role.DECODE)


if __name__ == "__main__":
    role.define_flags(port=50071)
    launch.run(main, serves=True)
