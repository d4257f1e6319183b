"""The Hugging Face hub, where it cannot be reached."""

import os
import sys
import urllib.error
import urllib.request

DEFAULT_ENDPOINT = "https://huggingface.co"
SECONDS_TO_WAIT = 5


def reachable() -> bool:
    """Whether the hub answers, through the proxies that the environment names."""
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT), timeout=SECONDS_TO_WAIT).close()
    except urllib.error.HTTPError:
        return True  # an answer, if an unfriendly one
    except OSError:
        return False
    return True


def go_offline() -> None:
    """Let the hub's libraries look in their caches alone: they would try again and again for a minute."""
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def prepare() -> None:
    """Before something is asked of the hub: where it does not answer, say so, and look in the caches alone."""
    if not reachable():
        print("the Hugging Face hub cannot be reached: only what is in the local cache can be used", file=sys.stderr)
        go_offline()
