# The backend and the chat page. The CPU image (PyTorch's CPU builds):
#     docker build -t seed-multimodal .
# For NVIDIA GPUs (run it with --gpus all):
#     docker build -t seed-multimodal:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# nano, nano-x and nano-lavit are in the image; other weights are mounted at /app/pretrained.
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
RUN python -m venv /opt/venv \
    && pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.13" "torchvision>=0.28" \
    && useradd --create-home --uid 10001 seed

WORKDIR /app
COPY pyproject.toml install.sh README.md License.txt NOTICE ./
COPY src src
RUN bash install.sh --extras demo && rm -rf /root/.cache

COPY configs configs
COPY gradio_demo gradio_demo
COPY images images
COPY scripts scripts
COPY pretrained pretrained

USER seed
EXPOSE 7890 7860
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m \
    CMD ["python", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:7890/health', timeout=4)"]
ENTRYPOINT ["bash"]
# Reachable from outside the container, so it needs SEED_TOKEN (docker run --env SEED_TOKEN=…).
CMD ["scripts/start_backend.sh", "nano", "--host", "0.0.0.0"]
