"""Makes the bundles of a study where its trials run: a Ray task for each, several at once.

A driver may lack the GPU that the trials had, and share no folder with the nodes. So a task
restores and evaluates a trial with the resources of a trial, and returns the files of its bundle.
"""

from collections.abc import Iterator, Sequence

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from batchcam.data.prepared import PreparedData
from batchcam.devices import is_out_of_memory
from batchcam.errors import BatchCamError, first_line
from studies.outcome.export import BundleFiles, StudyError, TrialRecord, make_bundle
from studies.planning.devices import check_device, trial_device
from studies.planning.resources import TrialResources

_RETRIES = 3
"""How often Ray runs a task again whose process or node was lost."""


def make_bundles(
    records: Sequence[TrialRecord],
    prepared: "ray.ObjectRef[PreparedData]",
    study: str,
    command: str,
    resources: TrialResources,
) -> Iterator[tuple[TrialRecord, BundleFiles]]:
    """Make the bundles of trials on the connected Ray cluster; yield each when it is whole.

    A task that runs out of memory, or whose process is lost again and again, runs once more with
    twice the resources, as long as there are more.

    Args:
        records: the trials, each once.
        prepared: the data of the study, in Ray's object store.
        study: name of the study.
        command: the command that made the study.
        resources: the resources of a trial.

    Raises:
        StudyError: a bundle cannot be made; the message names the trial.
        RayError: a task failed with an error that is not the user's; its notes name the trial.
    """
    running: dict[ray.ObjectRef[BundleFiles | None], tuple[TrialRecord, int]] = {}

    def start(record: TrialRecord, multiplier: int) -> None:
        request = resources.request(multiplier)
        remote = ray.remote(num_cpus=request["CPU"], num_gpus=request["GPU"], max_retries=_RETRIES)(
            _run
        )
        task = remote.remote(record, prepared, study, command, resources.enlarged(multiplier))
        running[task] = (record, multiplier)

    for record in records:
        start(record, 1)
    try:
        while running:
            (task,), _ = ray.wait(list(running), num_returns=1)
            record, multiplier = running.pop(task)
            files = _files(record, task)
            if files is not None:
                yield record, files
            elif resources.request(2 * multiplier) != resources.request(multiplier):
                start(record, 2 * multiplier)
            else:
                raise StudyError(
                    f"trial {record.trial_id} cannot be exported: out of memory, with all that a "
                    "node has; free memory on the nodes, or add a node with more, and --resume."
                )
    finally:
        for task in running:
            ray.cancel(task, force=True)


def _run(
    record: TrialRecord,
    prepared: PreparedData,
    study: str,
    command: str,
    resources: TrialResources,
) -> BundleFiles | None:
    """Make a bundle in a process of Ray; return None if memory was short."""
    torch.set_num_threads(resources.threads)
    device = trial_device(record.config, resources.gpus)
    check_device(device)
    try:
        return make_bundle(record, prepared, study, command, device)
    except Exception as error:
        if is_out_of_memory(error):
            return None
        raise


def _files(record: TrialRecord, task: "ray.ObjectRef[BundleFiles | None]") -> BundleFiles | None:
    """Return the result of a task that has ended; None if it lacked memory."""
    try:
        return ray.get(task)
    except (OutOfMemoryError, WorkerCrashedError):
        return None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, StudyError):  # It names the trial.
            raise cause from None
        if isinstance(cause, BatchCamError | OSError):
            raise StudyError(
                f"trial {record.trial_id} cannot be exported: {str(cause).rstrip('.')}. --resume "
                "exports again."
            ) from error
        error.add_note(f"Trial {record.trial_id} was being exported.")
        raise
    except RayError as error:
        raise StudyError(
            f"trial {record.trial_id} cannot be exported: {first_line(error)}; --resume "
            "exports again."
        ) from error
