"""The texts of `gpuslice --help` and of the help of each command, within 80 columns."""

EXIT_CODES = """\
exit codes:
  0  the command succeeded, or SIGTERM or SIGINT ended it
  1  the command started and failed; the last line on standard error says why
  2  a flag, an environment variable or the policy file is wrong
  3  the node is not ready: GPUs, NVIDIA driver, folders or records
  4  the API server refused a request or did not answer it
  130  Ctrl-C ended it before it was done (demo, playground up, devices, claims)
"""

ABOUT = """\
A Kubernetes DRA driver for NVIDIA GPU slices: whole cards, MIG, MPS and
time-slicing from the same card, chosen by each claim.
"""

EXAMPLES = """\
examples:
  gpuslice demo                       show every feature: no GPU, no cluster
  gpuslice playground up              a stand-in cluster for your own claims
  gpuslice run --simulate h100x2      run the kubelet plugin on simulated cards
  gpuslice run                        run the kubelet plugin on a GPU node
  gpuslice preflight                  check a node before the plugin starts
  gpuslice mps-supervisor             run the MPS daemons, beside the plugin
  gpuslice devices                    show what each GPU offers, and its claims
  gpuslice claims -o json             list the prepared claims, for a program
  gpuslice policy check policy.yaml   show what each GPU would offer
  gpuslice help run                   show what a command does, and its flags
"""

RUN = """\
Run the kubelet plugin: publish the node's GPUs as ResourceSlices, and prepare
the claims that the kubelet asks for.

The plugin needs the name of its Node, an API server (by the service account of
its pod, or --kubeconfig), the two plugin folders of the kubelet, and the CDI
folder of the container runtime. It keeps its records below the plugin folder.
You may kill it at any moment: the next start makes node, records and CDI files
agree.
"""

RUN_EXAMPLES = """\
examples:
  gpuslice run --node-name node-1 --kubeconfig /etc/kubernetes/kubelet.conf
  gpuslice run --node-name node-1 --kubeconfig ~/.kube/config \\
    --simulate h100x2 --policy policy.yaml --http-endpoint 127.0.0.1:9510
"""

PREFLIGHT = """\
Check a node before the kubelet plugin starts: the policy, the folders of the
kubelet and of the container runtime, the root of the NVIDIA driver, the rights
at the API server, and whether another installation serves the node.

An init container runs it before `gpuslice run`, with the same settings, and
`kubectl describe pod` shows its sentences. A node without a GPU or without an
NVIDIA driver passes, because the plugin waits for them. The command changes
nothing.
"""

PREFLIGHT_EXAMPLES = """\
examples:
  gpuslice preflight --node-name node-1 --policy policy.yaml
  kubectl logs --namespace gpuslice-system POD --container preflight
"""

SUPERVISOR = """\
Run the MPS daemons of this node: one daemon for each card or partition that
claims share by MPS.

Start the supervisor beside `gpuslice run`, with the same --mps-root. It is a
process of its own, so MPS clients keep running when you restart or upgrade the
driver. It runs nvidia-cuda-mps-control from the driver root; with --simulate,
it runs a stand-in for that program.
"""

SUPERVISOR_EXAMPLES = """\
examples:
  gpuslice mps-supervisor
  gpuslice mps-supervisor --simulate h100x2 --mps-root /tmp/try/mps
"""

DEMO = """\
Show every feature on this machine, without a GPU and without a cluster.

The demo starts the real driver as a process on a simulated node, with stand-ins
for API server, scheduler and kubelet. It makes claims for whole cards, MIG
partitions, MPS and time-slicing. After each step it shows what each claim got
and a map of the cards. At the end it removes everything.
"""

DEMO_EXAMPLES = """\
examples:
  gpuslice demo
  gpuslice demo --simulate a100-40gx2
"""

PLAYGROUND = """\
Try claims of your own on simulated cards: no GPU, no cluster, no root.

The playground runs the driver and the MPS supervisor as processes, beside a
stand-in API server, kubelet and scheduler. Everything is in one folder, and
`gpuslice playground down` removes it.
"""

PLAYGROUND_EXAMPLES = """\
examples:
  gpuslice playground up                          start it in the background
  gpuslice playground claim slice --memory 9Gi    make a claim, see what it gets
  gpuslice playground release slice-1             release the claim
  gpuslice playground down                        end everything
"""

DEVICES = """\
Show each GPU of this node: a map of its memory slices, what it offers, which
claims hold it, and what is unavailable and why.

On the node of a running driver the command needs no flag. Elsewhere give the
flags of `gpuslice run`. The command changes nothing.
"""

DEVICES_EXAMPLES = """\
examples:
  gpuslice devices
  gpuslice devices --simulate h100x2    what such a node would offer
  gpuslice devices -o json | jq '.gpus[].holders'
"""

CLAIMS = """\
List the prepared claims of this node, with the devices and the share of each.

The command reads the records of the driver. It needs no GPU and no running
driver, and it changes nothing.
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

UNINSTALL = """\
Remove the driver from the nodes of a cluster, before its objects are deleted.

`helm uninstall` runs it as a Job. While a claim has a device, it removes
nothing and says so. If the DaemonSet of the driver has the annotation
gpuslice.dev/uninstall=evict, it evicts the pods first. The driver serves until
no claim is prepared on any node. See docs/uninstall.md.
"""

UNINSTALL_EXAMPLES = """\
examples:
  gpuslice uninstall --namespace gpuslice-system --manifest cleanup.yaml
  gpuslice uninstall --timeout 3600    in the Job: wait for an hour
"""

CLEANUP = """\
Remove what the driver left on this node: records, sockets, CDI files, folders,
mounts, and MPS daemons of a supervisor that crashed. While a claim is prepared,
it removes nothing. It waits for a driver that is ending.

`gpuslice uninstall` runs it on each node.
"""

CLEANUP_EXAMPLES = """\
examples:
  gpuslice cleanup --check    wait until no claim is prepared
  gpuslice cleanup            remove everything
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
