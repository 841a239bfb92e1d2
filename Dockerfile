# docker build -t gpuslice:0.1.0 .
#
# The same files as `hack/image` makes, from the same recipe and the same lock: hack/lib/image/recipe.py says what is in the
# image and why, tests/deploy/test_image.py holds the two together.
FROM debian:bookworm-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates python3 python3-pip
WORKDIR /src
COPY . .
RUN python3 -m hack.lib.image --rootfs /rootfs

FROM scratch
COPY --from=build /rootfs /
LABEL org.opencontainers.image.title="gpuslice" \
      org.opencontainers.image.description="A Kubernetes DRA driver for NVIDIA GPU slices: whole GPUs, MIG, MPS and time-slicing from the same card" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/usr/local/bin:/usr/bin PYTHONUNBUFFERED=1 GRPC_VERBOSITY=NONE
USER 0:0
WORKDIR /
ENTRYPOINT ["python3", "-m", "gpuslice"]
CMD ["run"]
