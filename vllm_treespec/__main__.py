"""``python -m vllm_treespec [SPECULATIVE_CONFIG]``: will it work here, and as what?"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version

from vllm_treespec.config import METHOD, ConfigError, TreeSpecConfig


def main(arguments: list[str] | None = None) -> int:
    """Print versions, seams and the parsed config; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_treespec", description=__doc__
    )
    parser.add_argument(
        "speculative_config",
        nargs="?",
        default=json.dumps({"method": METHOD}),
        help="the JSON given to --speculative-config",
    )
    options = parser.parse_args(arguments)
    print(f"vllm-treespec {version('vllm-treespec')}")
    seams_ok = _print_seams()
    config_ok = _print_config(options.speculative_config)
    return 0 if seams_ok and config_ok else 1


def _print_seams() -> bool:
    try:
        import vllm
    except ImportError as error:
        print(f"vllm: not importable ({error}); pip install 'vllm-treespec[cuda]'")
        return False
    from vllm_treespec.integration.seams import HOOKS, PATCHES, SeamError

    print(f"vllm {vllm.__version__}")
    all_ok = True
    for kind, seams in (("patch", PATCHES), ("hook", HOOKS)):
        for seam in seams:
            try:
                seam.check()
                state = "ok   "
            except SeamError as error:
                state, all_ok = f"moved ({error})", False
            print(f"  {kind:5} {state} {seam.target}  # {seam.why}")
    return all_ok


def _print_config(text: str) -> bool:
    try:
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise ConfigError(f"{text}: must be a JSON object")
        config = TreeSpecConfig.parse(raw)
    except (json.JSONDecodeError, ConfigError) as error:
        print(f"config: {error}")
        return False
    print("config:", json.dumps(config.to_dict(), indent=2))
    return True


if __name__ == "__main__":
    sys.exit(main())
