"""What `gpuslice --help` and the help of each command say, within 80 columns."""

EXIT_CODES = """\
exit codes:
  0  done, or ended by SIGTERM / SIGINT
  1  it ran and failed; the last line on standard error says at what
  2  wrong usage: a flag, an environment variable, a policy file
  3  the node is not ready: GPUs, NVIDIA driver, folders, records
  4  the API server refused or did not answer
  130  ended by Ctrl-C before it was done (demo, devices, claims)
"""

ABOUT = """\
A Kubernetes DRA driver for NVIDIA GPU slices: whole cards, MIG, MPS and
time-slicing from the same card, chosen by each claim.
"""

EXAMPLES = """\
examples:
  gpuslice demo                       see it all: no GPU, no cluster needed
  gpuslice run --simulate h100x2      the kubelet plugin, on simulated cards
  gpuslice run                        the same on a GPU node
  gpuslice devices                    each GPU: its offers, who holds what
  gpuslice claims -o json             what is prepared here, for a program
  gpuslice policy check policy.yaml   what each GPU would offer
  gpuslice help run                   what a command does, and its flags
"""

RUN = """\
Run the kubelet plugin: publish the node's GPUs as ResourceSlices, and prepare
the claims that the kubelet asks for.

It needs a Node name, an API server (a service account in a pod, else
--kubeconfig), the kubelet's two plugin folders and the container runtime's CDI
folder. It keeps its records below the plugin folder and may be killed at any
moment: the next start puts node, records and CDI files in agreement.
"""

RUN_EXAMPLES = """\
examples:
  gpuslice run --node-name node-1 --kubeconfig /etc/kubernetes/kubelet.conf
  gpuslice run --node-name node-1 --kubeconfig ~/.kube/config \\
    --simulate h100x2 --policy policy.yaml --http-endpoint 127.0.0.1:9510
"""

SUPERVISOR = """\
Own the MPS daemons of this node, one for each card or partition that is shared
by MPS.

A process of its own, beside `run` and with the same --mps-root, so that
restarting or upgrading the driver leaves MPS clients running. It runs
nvidia-cuda-mps-control from the driver root, or with --simulate a stand-in.
"""

SUPERVISOR_EXAMPLES = """\
examples:
  gpuslice mps-supervisor
  gpuslice mps-supervisor --simulate h100x2 --mps-root /tmp/try/mps
"""

DEMO = """\
See it all on this machine, without a GPU and without a cluster.

It starts the real driver as a process on a simulated node, beside a stand-in
API server and kubelet, hands out claims for whole cards and MIG partitions,
shows what each one got and the map of the cards after each step, and cleans up.
"""

DEMO_EXAMPLES = """\
examples:
  gpuslice demo
  gpuslice demo --simulate a100-40gx2
"""

DEVICES = """\
Show each GPU of this node: a map of its memory slices, what it offers, who
holds what, and what cannot be used and why.

On the node of a running driver no flag is needed. Elsewhere give the flags of
`run`. Nothing is changed.
"""

DEVICES_EXAMPLES = """\
examples:
  gpuslice devices
  gpuslice devices --simulate h100x2    what such a node would offer
  gpuslice devices -o json | jq '.gpus[].holders'
"""

CLAIMS = """\
List what is prepared on this node. It reads the records of the driver, and
needs neither a GPU nor a running driver.
"""

CLAIMS_EXAMPLES = """\
examples:
  gpuslice claims
  gpuslice claims -o wide               with the UIDs and the UUIDs
  gpuslice claims -o yaml
"""

POLICY = """\
Work on a policy file: what each GPU may offer (docs/policy.md).
"""

CHECK = """\
Read a policy file and print what each GPU would offer under it. What has no
effect on these GPUs is a warning. An error ends with exit code 2.

It changes nothing and needs no cluster. Without --simulate it asks the GPUs of
this node.
"""

CHECK_EXAMPLES = """\
examples:
  gpuslice policy check policy.yaml
  gpuslice policy check policy.yaml --simulate h100x4+l4
"""

COMPLETION = """\
Print a script that completes commands, flags and values in your shell.
"""

COMPLETION_EXAMPLES = """\
examples:
  source <(gpuslice completion bash)    put it into ~/.bashrc
  source <(gpuslice completion zsh)     put it into ~/.zshrc, after compinit
  gpuslice completion fish > ~/.config/fish/completions/gpuslice.fish
"""

HELP = """\
Show the help of a command.
"""

HELP_EXAMPLES = """\
examples:
  gpuslice help run
  gpuslice help policy check
"""
