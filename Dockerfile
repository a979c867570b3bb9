# c2v-rag in a container: the server, or with the command "app" the search page.
#
#   docker build -t c2v-rag .                                   # torch with CUDA, for `docker run --gpus all`
#   docker build -t c2v-rag --build-arg TORCH_INDEX=URL .       # URL: a package index with CPU builds of torch
#   docker run --read-only --tmpfs /tmp -v c2v-cache:/cache -p 127.0.0.1:8000:8000 c2v-rag
#
# WEIGHTS=image puts the default's weights into the image. With WEIGHTS=volume they are taken from the Hugging Face Hub at
# the first start. Both are kept in the volume /cache.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=""
ARG WEIGHTS=image
WORKDIR /source
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 C2V_RAG_CACHE=/weights
COPY constraints.txt ./
RUN python -m venv /venv && mkdir /weights \
    && /venv/bin/pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY . .
RUN /venv/bin/pip install -c constraints.txt ".[gguf,server,demo]" \
    && if [ "$WEIGHTS" = image ]; then /venv/bin/c2v-rag download default; fi

FROM python:${PYTHON}-slim
RUN useradd --uid 10001 --create-home c2v && mkdir /cache /store && chown c2v /cache /store
COPY --from=build /venv /venv
COPY --from=build --chown=c2v /weights /cache/c2v_rag
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    C2V_RAG_CACHE=/cache/c2v_rag \
    HF_HOME=/cache/huggingface \
    GRADIO_TEMP_DIR=/tmp/gradio
USER c2v
VOLUME ["/cache", "/store"]
EXPOSE 8000 7860
# The server or the page answers as soon as the model is loaded.
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
    CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=4)" \
    || python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/', timeout=4)"
ENTRYPOINT ["c2v-rag"]
# Everyone who reaches the container's port can use it: publish the port to 127.0.0.1, or give --api-key-file.
CMD ["serve", "--host", "0.0.0.0", "--no-key"]
