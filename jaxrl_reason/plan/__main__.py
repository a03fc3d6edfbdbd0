import sys

from jaxrl_reason.plan import main

if __name__ == "__main__":
    sys.exit(main())
