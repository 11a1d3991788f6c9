# Sourced in an application's folder by its training scripts: `launch PORT ARGUMENTS…` starts PROGRAM (by default
# src/train/train.py) as one process, or by torchrun on any number of nodes. From the environment, torchrun's names first:
#   NPROC (or NPROC_PER_NODE, HOST_GPU_NUM)  processes on this node; default: its GPUs, or one
#   NNODES (HOST_NUM)                        nodes; default 1
#   NODE_RANK (INDEX)                        this node's number; default 0
#   MASTER_ADDR (CHIEF_IP), MASTER_PORT      node 0's address and a free port on it
#   SEED_RDZV_MINUTES                        how long the nodes wait for each other; default 1
# NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and the like are used if they are set. On several nodes GLOO_SOCKET_IFNAME is by
# default the interface that leads to node 0.
ROOT=..
. ../scripts/environment.sh

counted() { # NAMES VALUE
    case $1:$2 in
        NPROC*:auto | NPROC*:gpu | NPROC*:cpu) return 0 ;;
    esac
    case $2 in
        '' | 0* | *[!0-9]*) ;;
        *) return 0 ;;
    esac
    echo "$0: $1 must be a number from 1 on, not '$2'." >&2
    exit 2
}

# The interface that connects this node with HOST, node 0. Without it gloo takes the address of this node's own name, which
# other nodes cannot reach where /etc/hosts says 127.0.1.1 (Debian, many pods).
interface_to() { # HOST
    address=$(getent ahostsv4 "$1" | sed -n '1s/ .*//p')
    interface=$(ip -4 route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
    if [ "$interface" = lo ]; then # this is node 0: the interface that has the address
        interface=$(ip -4 -o addr show to "$address" | sed -n '1s/^[0-9]*: *\([^ ]*\).*/\1/p')
    fi
    if [ "${interface:-lo}" = lo ]; then
        interface=$(ip -4 route show default | sed -n '1s/.* dev \([^ ]*\).*/\1/p')
    fi
    echo "$interface"
}

launch() {
    port=$1
    shift
    processes=${NPROC:-${NPROC_PER_NODE:-${HOST_GPU_NUM:-}}}
    if [ -z "$processes" ]; then
        processes=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
    fi
    nodes=${NNODES:-${HOST_NUM:-1}}
    counted "NPROC (NPROC_PER_NODE, HOST_GPU_NUM)" "$processes"
    counted "NNODES (HOST_NUM)" "$nodes"
    counted MASTER_PORT "${MASTER_PORT:-$port}"
    node=${NODE_RANK:-${INDEX:-0}}
    [ "$nodes" != 1 ] || node=${NODE_RANK:-0} # INDEX may be of another program
    # A node that does not know of the others would train alone.
    case $node in
        *[!0-9]*) is_node=false ;;
        *) [ "$node" -lt "$nodes" ] && is_node=true || is_node=false ;;
    esac
    if [ $is_node = false ]; then
        echo "$0: NODE_RANK (INDEX) is '$node', but must be below NNODES (HOST_NUM), which is $nodes." >&2
        exit 2
    fi
    if [ "$nodes" = 1 ] && [ "$processes" = 1 ]; then
        exec "$PYTHON" "${PROGRAM:-src/train/train.py}" "$@"
    fi
    PYTHONPATH=$(cd ../src && pwd)${PYTHONPATH:+:$PYTHONPATH}  # a checkout need not be installed
    export PYTHONPATH
    if [ "$nodes" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then
        where=--standalone
    else
        where="--nnodes=$nodes --node_rank=$node --master_port=${MASTER_PORT:-$port}"
        master=${MASTER_ADDR:-${CHIEF_IP:-127.0.0.1}}
        where="$where --master_addr=$master"
        case $nodes:$master:${GLOO_SOCKET_IFNAME:-} in
            1:* | *:localhost:* | *:127.*:*) ;; # all processes are on this machine
            *:*:?*) ;;
            *)
                GLOO_SOCKET_IFNAME=$(interface_to "$master" 2>/dev/null)
                [ -z "$GLOO_SOCKET_IFNAME" ] || export GLOO_SOCKET_IFNAME
                ;;
        esac
    fi
    case $processes in
        *[!0-9]*) ;;
        *)
            # Those that this process may use (macOS has no nproc), not all of the machine's.
            cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
            export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( (cores + processes - 1) / processes ))}"
            ;;
    esac
    # shellcheck disable=SC2086
    exec "$PYTHON" -m seed_multimodal.training.torchrun $where --nproc_per_node="$processes" \
        "${PROGRAM:-src/train/train.py}" "$@"
}
