#!/usr/bin/env bash
# The command and its tests on Arm, under emulation. As root on Debian for x86-64 with qemu-user-static, mmdebstrap, git
# and, as python3, one that runs the tests:
#
#     bash tests/tools/arm.sh ROOT [arguments of pytest]
#
# ROOT (1.3 GB) becomes Debian for arm64 with what the tests need, if it is missing. With arguments, only that pytest
# runs. Without, the tiny checkpoint is converted in many ways on both processors and the files are compared, then the
# tests run that need neither transformers nor vLLM, but for those of memory, to which the emulator's own counts: an hour
# and a half on two cores.
#
# What was found, with an earlier version, on Debian 13 with Python 3.13 and torch 2.10.0, run as a Neoverse N1 under
# QEMU. The tiny checkpoint in three formats, with absmax, mse and error feedback, with and without a C compiler: all 156
# files equal those of x86-64 byte for byte. Of the tests 819 of 830 passed. Six of the others measure memory; five ran
# out of time, of which four passed when run alone and one was not run again. Speed and memory on a real Spark or Orin
# were not measured.
set -euo pipefail

root=$(realpath -m "${1:?"usage: bash tests/tools/arm.sh ROOT [arguments of pytest]"}")
if [ -z "${IN_NAMESPACE-}" ]; then # mounts and processes end with it, however this ends
    IN_NAMESPACE=1 exec unshare --mount --pid --fork --kill-child --mount-proc "$BASH" "$0" "$@"
fi
shift
cd "$(dirname "$0")/../.."
export QEMU_CPU=neoverse-n1 # the default has pointer authentication, whose emulation makes all 20 times slower

binfmt=/proc/sys/fs/binfmt_misc
mount -t binfmt_misc binfmt_misc $binfmt
if [ ! -e $binfmt/qemu-aarch64 ]; then
    trap 'echo -1 > $binfmt/qemu-aarch64' EXIT
    cat /usr/lib/binfmt.d/qemu-aarch64.conf > $binfmt/register
fi

if [ ! -d "$root" ]; then
    rm -rf "$root.part"
    mmdebstrap --arch=arm64 --variant=minbase --skip=check/qemu --include=python3,gcc,libc6-dev,libgomp1,libstdc++6 \
        trixie "$root.part"
    # Into a folder that Python knows, since the tests set PYTHONPATH. Without torch's dependencies, which pip would
    # choose for this processor; later versions' wheels for Arm are CUDA builds.
    pip=(python3 -m pip install -q --target "$root.part/usr/local/lib/python3.13/dist-packages" --python-version 3.13
        --only-binary=:all: --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64)
    "${pip[@]}" --no-deps torch==2.10.0
    grep -E '^(safetensors|psutil|numpy|pytest|hypothesis)' tests/requirements.txt |
        "${pip[@]}" -r /dev/stdin filelock typing-extensions setuptools sympy networkx jinja2 fsspec
    mv "$root.part" "$root"
fi

rm -rf "$root/src" && mkdir "$root/src"
git ls-files -z | tar -c --null -T - | tar -x -C "$root/src"
# Emulated, it takes 10 to 30.
sed -i 's/^COMPILER_TIMEOUT_S = 60 /COMPILER_TIMEOUT_S = 600 /' "$root/src/quantize_int4.py"
mount -t proc proc "$root/proc"
for folder in dev sys; do mount --rbind /$folder "$root/$folder"; done
on_arm=(chroot "$root" env -C /src python3)
"${on_arm[@]}" -c 'import platform, torch; print(platform.platform(), "torch", torch.__version__)'

status=0
if [ $# = 0 ]; then
    python3 tests/tools/every_way.py --sources "$root/src/here"
    cp -a "$root/src/here" "$root/src/arm" # with the times, which the shards' headers hold
    python3 tests/tools/every_way.py "$root/src/here"
    "${on_arm[@]}" tests/tools/every_way.py arm
    if diff -rq "$root/src/here" "$root/src/arm"; then
        echo "equal on both processors: all $(find "$root/src/arm/out" -type f | wc -l) files"
    else
        status=1
    fi
    names=(options errors checkpoint checkpoint_headers checkpoint_pickles quantization kernel formats statistics
        output_folder conversion verification command)
    set -- "${names[@]/#/tests/test_}"
    set -- "${@/%/.py}"
fi
"${on_arm[@]}" -m pytest "$@" || status=$?
exit $status
