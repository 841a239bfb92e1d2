"""The network of the cluster's pods, as files for containerd.

If the driver runs as a process, a pod has only its own loopback interface. If the driver is installed in pods, each pod has an
address on a bridge of this machine, because the driver asks the API server and the kubelet asks the driver's probes. No packet
leaves the machine: the pods' addresses are in TEST-NET-2 (RFC 5737), and nothing forwards them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hack.lib.cluster import binaries
from hack.lib.cluster.layout import GATEWAY, PODS, Facts, Place

BRIDGE = "gpuslice1"

# The kubelet needs an address, so this plugin names one. No machine answers at that address.
_NONE = """\
#!{busybox} sh
case $CNI_COMMAND in
ADD)
  echo '{{"cniVersion": "1.0.0", "interfaces": [{{"name": "eth0", "sandbox": "'$CNI_NETNS'"}}],'
  echo '"ips": [{{"address": "192.0.2.1/32", "interface": 0}}]}}'
  ;;
VERSION) echo '{{"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}}' ;;
esac
"""

_ON_BRIDGE: Mapping[str, Any] = {
    "type": "bridge",
    "bridge": BRIDGE,  # made with its address before, because the API server listens there
    "ipam": {
        "type": "host-local",
        "ranges": [[{"subnet": PODS, "gateway": GATEWAY}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": "/run/cni",  # a reboot of the node forgets the addresses with the pods
    },
}


def programs(place: Place, facts: Facts) -> Path:
    """The folder of the network's plugins."""
    return binaries.cni() if facts.installed else place.cni


def write(place: Place, facts: Facts, busybox: str) -> None:
    """Write the configuration of the network, and the plugin of a network without any connection."""
    (place.cni / "conf").mkdir(parents=True)
    plugin = _ON_BRIDGE if facts.installed else {"type": "none"}
    network = {"cniVersion": "1.0.0", "name": "pods", "plugins": [plugin]}
    (place.cni / "conf" / "pods.conflist").write_text(json.dumps(network))
    if not facts.installed:
        none = place.cni / "none"
        none.write_text(_NONE.format(busybox=busybox))
        none.chmod(0o755)
