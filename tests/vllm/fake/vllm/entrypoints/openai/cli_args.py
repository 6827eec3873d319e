def make_arg_parser(parser):
    for name in ("model", "served-model-name", "uds", "worker-cls", "distributed-executor-backend", "dtype"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--kv-cache-memory-bytes", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--enable-sleep-mode", action="store_true")
    parser.add_argument("--middleware", action="append", default=[])
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--no-enable-prefix-caching", action="store_true")
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--token-seconds", type=float, default=0.0)
    parser.add_argument("--profile-seconds", type=float, default=0.0)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--shutdown-timeout", type=int, default=0)
    parser.add_argument("--fail-at", default="")
    parser.add_argument("--rots-with", default="")
    parser.add_argument("--max-logprobs", type=int, default=20)
    return parser


def validate_parsed_serve_args(args):
    if args.max_num_seqs < 1:
        raise ValueError("max_num_seqs is less than 1")
