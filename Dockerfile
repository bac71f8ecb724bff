# The package on NVIDIA's PyTorch image, whose torch, Apex, Transformer Engine and flash-attn are kept as they are.
#
#     docker build -t megatron-gemini .
#     docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --user "$(id -u):$(id -g)" -e HOME=/tmp \
#         -v "$PWD/runs:/workspace/megatron_gemini/runs" megatron-gemini
#
# Not yet built or run by the authors; the build fails by itself when the image lacks a library or one was replaced.
# Another release of the image: --build-arg IMAGE=nvcr.io/nvidia/pytorch:YY.MM-py3
# Pipeline parallelism needs an image with torch 2.13; offload to NVMe needs libaio-dev in it.

ARG IMAGE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${IMAGE}

WORKDIR /workspace/megatron_gemini
COPY requirements.txt tools/image_libraries.py /tmp/install/

# What the image has, as pip's constraints: one of them replaced fails this step, not a run days later.
# PIP_CONSTRAINT, the image's own list, is kept as well. torch's line is left out of the requirements: the image's torch
# may be a pre-release that no range names.
RUN python3 /tmp/install/image_libraries.py record /tmp/install/image.txt \
    && grep -v '^torch[<>=]' /tmp/install/requirements.txt > /tmp/install/ours.txt \
    && python3 -m pip install --no-cache-dir -c /tmp/install/image.txt -r /tmp/install/ours.txt \
    && python3 /tmp/install/image_libraries.py check /tmp/install/image.txt

COPY . .
RUN python3 -m pip install --no-cache-dir --no-deps --no-build-isolation -e . \
    && python3 /tmp/install/image_libraries.py check /tmp/install/image.txt \
    && megatron-gemini --help > /dev/null

CMD ["bash"]
