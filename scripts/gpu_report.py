"""The table of scripts/gpu_report.sh from what the build kept of each unit: ptxas's words on registers and spills, PTX for
launch bounds and dynamic shared memory, SASS for the inner loop. Only the standard library."""
import argparse
import collections
import concurrent.futures
import pathlib
import re
import shutil
import subprocess
import sys

ARCHS = ["80", "90", "120"]
# Per multiprocessor: registers, shared bytes, warps, blocks. CUDA programming guide, compute capabilities.
LIMITS = {"80": (65536, 164 * 1024, 64, 32), "90": (65536, 228 * 1024, 64, 32), "120": (65536, 100 * 1024, 48, 24)}
RESERVED_SHARED = 1024  # of every block, from sm_80 on

CLASSES = [
    ("MMA", r"^(HMMA|QMMA|IMMA|OMMA|HGMMA)"),
    ("cp.async", r"^LDGSTS"),
    ("ld.shared", r"^(LDS|LDSM)"),
    ("ld.global", r"^(LDG|LD\b|LDC)"),
    ("store", r"^(STG|STS|ST\b|RED|ATOM)"),
    ("float", r"^(FADD|FMUL|FFMA|FMNMX|FSEL|FSETP|HMUL2|HFMA2|HADD2|MUFU|F2F|DMUL|DADD|DFMA)"),
    ("integer", r"^(IADD|IMAD|LOP3|SHF|PRMT|LEA|ISETP|IMNMX|SEL|I2F|F2I|VIADD|IABS|POPC|FLO)"),
    ("shuffle", r"^(SHFL|VOTE)"),
]


def run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stderr}")
    return result.stdout + result.stderr


def demangle(name):
    """kernel<format, scale, fragments> of a mangled name, without the namespaces."""
    filt = shutil.which("c++filt")
    text = run([filt, name]).strip() if filt else name
    match = re.search(r"(\w+?)_kernel(<.*?>)?\(", text)
    if not match:
        return text
    numbers = re.findall(r"[), ](\d+)(?=[,>])", match.group(2) or "")
    if len(numbers) < 3:
        return match.group(1)
    formats = {"0": "mxfp4", "1": "fp8", "2": "bf16"}
    scales = {"0": "", "1": "", "2": " f32", "3": ""}
    return f"{match.group(1)} {formats[numbers[0]]}{scales[numbers[1]]}, {8 * int(numbers[2])} tokens"


def resources(log, arch):
    """mangled name -> registers, spilled bytes, static shared bytes, on one architecture."""
    out = {}
    name = None
    spills = 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)\w*'", line):
            name = match.group(1) if match.group(2) == arch else None
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(match.group(1)) + int(match.group(2))
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            out[name] = (int(match.group(1)), spills, int(shared.group(1)) if shared else 0)
            name = None
    return out


def launch_facts(ptx):
    """mangled name -> threads a block, dynamic shared bytes."""
    out = {}
    for entry in re.split(r"(?=\.entry )", ptx)[1:]:
        name = re.match(r"\.entry (\S+?)\(", entry).group(1)
        threads = re.search(r"\.maxntid (\d+)", entry)
        dynamic = re.search(r"// dynamic shared bytes (\d+)", entry)
        out[name] = (int(threads.group(1)), int(dynamic.group(1)) if dynamic else 0)
    return out


def inner_loop(sass):
    """Instructions of the innermost loop with the most MMAs, else of the one with the most loads; of all without loops."""
    code = [(int(m.group(1), 16), m.group(3), m.group(4)) for m in
            re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);", sass)]
    labels = {}
    for match in re.finditer(r"^(\.L_x_\d+):\s*$\n(?:.*\n)*?\s*/\*([0-9a-f]{4,})\*/", sass, re.M):
        labels[match.group(1)] = int(match.group(2), 16)
    loops = []
    for address, op, rest in code:
        if op != "BRA":
            continue
        label = re.search(r"\.L_x_\d+", rest)
        if label and label.group(0) in labels and labels[label.group(0)] < address:
            loops.append((labels[label.group(0)], address))
    innermost = [l for l in loops if not any(o != l and l[0] <= o[0] and o[1] <= l[1] for o in loops)]
    bodies = [[op for address, op, _ in code if first <= address <= last] for first, last in innermost]
    if not bodies:
        return [op for _, op, _ in code]
    count = lambda body, pattern: sum(bool(re.match(pattern, op)) for op in body)
    return max(bodies, key=lambda b: (count(b, CLASSES[0][1]), count(b, r"^(LDG|LDS|LDGSTS|LDSM)"), len(b)))


def occupancy(arch, threads, registers, shared):
    register_file, shared_bytes, max_warps, max_blocks = LIMITS[arch]
    warps = (threads + 31) // 32
    by_registers = register_file // ((registers * 32 + 255) // 256 * 256 * warps)
    by_shared = shared_bytes // ((shared + RESERVED_SHARED + 127) // 128 * 128)
    return min(by_registers, by_shared, max_warps // warps, max_blocks) * warps / max_warps


def one(folder, pattern):
    """The one file of that name; the versions of nvcc put different words between the unit and the architecture."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} holds {len(found)} files like {pattern}: build target tc_kernels_cuda of the preset anew")
    return found[0]


def read_unit(job):
    """One unit on one architecture: what ptxas said, the PTX, and the disassembled cubin."""
    unit, arch, folder = job
    log = one(folder, f"{unit}.ptxas.txt").read_text()
    ptx = one(folder, f"{unit}.*compute_{arch}.ptx").read_text()
    sass = run(["nvdisasm", "-c", str(one(folder, f"{unit}.*sm_{arch}.cubin"))]) if shutil.which("nvdisasm") else ""
    return unit, arch, log, ptx, sass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kept", default="build/release/cuda_kept", help="where the build keeps what nvcc made")
    parser.add_argument("--out", help="write the table here as Markdown")
    parser.add_argument("--arch", action="append", choices=ARCHS)
    args = parser.parse_args()
    archs = args.arch or ARCHS
    units = sorted(p.stem for p in pathlib.Path("kernels_gpu").glob("*.cu") if p.stem not in ("kernel_table", "device_list"))
    rows, spilled = [], []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = [(u, a, pathlib.Path(args.kept)) for u in units for a in archs]
        for unit, arch, log, ptx, sass in pool.map(read_unit, jobs):
            facts = launch_facts(ptx)
            bodies = dict(zip(re.findall(r"^\.text\.(\S+):", sass, re.M), re.split(r"^\.text\.\S+:", sass, flags=re.M)[1:]))
            for name, (registers, spills, shared) in resources(log, arch).items():
                threads, dynamic = facts[name]
                mix = collections.Counter()
                for op in inner_loop(bodies.get(name, "")):
                    mix[next((c for c, pattern in CLASSES if re.match(pattern, op)), "other")] += 1
                title = demangle(name)
                if spills:
                    spilled.append(f"{title} on sm_{arch}: {spills} bytes")
                rows.append((title, int(arch), threads, registers, spills, shared + dynamic,
                             occupancy(arch, threads, registers, shared + dynamic), mix))
    if not rows:
        sys.exit("no kernel was found: the report would be empty")
    rows.sort(key=lambda r: (r[0], r[1]))
    head = ["kernel", "sm", "threads", "registers", "spilled", "shared KiB", "occupancy"] + [c for c, _ in CLASSES] + ["other"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for title, arch, threads, registers, spills, shared, share, mix in rows:
        cells = [title, arch, threads, registers, spills, f"{shared / 1024:.1f}", f"{share:.0%}"]
        cells += [mix[c] or "" for c in head[7:]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    print("\n".join(lines))
    if args.out:
        pathlib.Path(args.out).write_text(
            "# GPU kernels: what they take\n\nMade by `scripts/gpu_report.sh --out docs/gpu-kernels.md`. Compiled, not run: "
            "occupancy is what registers and\nshared memory allow; the right half counts the instructions of the innermost "
            "loop with the most MMAs (else loads).\nKernels take a number of tokens a block owns: 8, 16 or 64.\n\n" + "\n".join(lines) + "\n")
    if spilled:
        sys.exit("spills:\n  " + "\n  ".join(spilled))
    print(f"{len(rows)} kernels and architectures, no spills", file=sys.stderr)


if __name__ == "__main__":
    main()
