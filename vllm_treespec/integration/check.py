"""Will it work here, and as what?"""

from __future__ import annotations

import json
from importlib.metadata import version

from vllm_treespec.config import ConfigError, TreeSpecConfig


def check(speculative_config: str) -> bool:
    """Print versions, seams and the parsed config; True if nothing is wrong."""
    print(f"vllm-treespec {version('vllm-treespec')}")
    seams_ok = _print_seams()
    config_ok = _print_config(speculative_config)
    return seams_ok and config_ok


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
