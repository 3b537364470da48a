# One image for the five processes, their migrations and the workers: `args` choose (python -m mainspring_state, …).
# docker build -t mainspring:dev .
FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/mainspring
ENV PATH=/opt/mainspring/bin:$PATH
WORKDIR /src
# First what changes seldom: a change of code keeps this layer.
COPY requirements.platform.lock ./
RUN pip install --require-hashes --only-binary :all: -r requirements.platform.lock
COPY pyproject.toml README.md LICENSE ./
COPY sdk ./sdk
COPY services ./services
COPY gateway ./gateway
COPY console ./console
RUN pip install --no-deps --no-build-isolation . && python -m compileall -q /opt/mainspring

FROM python:3.11-slim
RUN useradd --system --uid 10001 --user-group --no-create-home mainspring
COPY --from=build /opt/mainspring /opt/mainspring
ENV PATH=/opt/mainspring/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# As `mainspring dev` sets it; see docs/decisions/0009.
ENV GRPC_EXPERIMENTS=-event_engine_client,-event_engine_listener
USER 10001:10001
WORKDIR /tmp
# A worker for tools of your own: FROM this image, add the modules, and run `mainspring worker MODULE`.
CMD ["mainspring", "--help"]
