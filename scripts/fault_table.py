"""The faults that planted_faults.py plants, and the tests that should catch each."""

from dataclasses import dataclass

PARTS = ("Python", "Triton", "CUDA", "C++")


@dataclass(frozen=True)
class Fault:
    """`text`, which is in `file` once, becomes `fault`; `tests` are pytest's arguments for what should catch it.

    Args:
        check: of tests/cuda_host, for a CUDA source: "memory" or "races".
    """

    name: str
    file: str
    text: str
    fault: str
    tests: str
    check: str = "memory"

    @property
    def part(self) -> str:
        if self.file.startswith("lenet_fast/triton_"):
            return "Triton"
        if self.file.startswith("lenet_fast/"):
            return "Python"
        return "CUDA" if self.file.startswith("csrc/cuda/") else "C++"


PYTHON = (
    Fault(
        "a trainer's run drops the smaller last batch",
        "lenet_fast/trainer.py",
        "steps = math.ceil(len(labels) / batch_size)",
        "steps = len(labels) // batch_size",
        "tests/test_trainer.py::test_a_run_is_the_loop_anyone_would_write",
    ),
    Fault(
        "the upper end of an order is not checked",
        "lenet_fast/trainer.py",
        "if not 0 <= index < len(labels):",
        "if not 0 <= index:",
        "tests/test_trainer.py::test_images_and_labels_are_checked",
    ),
    Fault(
        "the step that diverged is counted from the start of its epoch",
        "lenet_fast/trainer.py",
        "raise TrainingError(_not_finite(before + done))",
        "raise TrainingError(_not_finite(done))",
        "tests/test_trainer.py::test_a_later_epoch_that_diverges_counts_all_steps",
    ),
    Fault(
        "the masks of whole maps are those of the first values",
        "lenet_fast/dropout_masks.py",
        "words = philox((blocks, images, step, 2 * place + maps), seed)",
        "words = philox((blocks, images, step, 2 * place), seed)",
        "tests/test_dropout_masks.py::test_masks_are_independent_of_each_other",
    ),
    Fault(
        "frozen parameters are trained",
        "lenet_fast/training_operands.py",
        "self.trains = [int(p.requires_grad) for p in self.parameters]",
        "self.trains = [1 for p in self.parameters]",
        "tests/test_trainer.py::test_frozen_parameters_stay",
    ),
    Fault(
        "tensors that change while they stay the same objects go unnoticed",
        "lenet_fast/training_operands.py",
        "elif self._marks_now() != self._marks:",
        "elif False:",
        "tests/test_trainer.py::test_what_cannot_be_trained_any_more_is_refused",
    ),
    Fault(
        "the reader takes an activation behind average pooling as one before it",
        "lenet_fast/network.py",
        'if self.pool not in ("none", "max"):',
        'if self.pool == "subsample":',
        "tests/test_any_model.py::test_layers_that_native_steps_do_not_have",
    ),
    Fault(
        "the reader takes a parameter that two layers share",
        "lenet_fast/network.py",
        "            if parameter in owners:\n",
        "            if parameter is None:\n",
        "tests/test_any_model.py::test_shared_parameters",
    ),
    Fault(
        "a dropout of single values moves behind a pooling",
        "lenet_fast/network.py",
        "            if self.drops.values:\n",
        "            if False:\n",
        "tests/test_any_model.py::test_layers_that_native_steps_do_not_have",
    ),
    Fault(
        "a view that puts two images together is taken for a flattening",
        "lenet_fast/calls.py",
        "if not after.dim() or not _same(before.shape[0], after.shape[0]):",
        "if not after.dim():",
        "tests/test_any_model.py::test_forwards_that_someone_wrote",
    ),
    Fault(
        "hooks that are added after a forward was read are not seen",
        "lenet_fast/captured.py",
        "    guard_modules()\n",
        "",
        "tests/test_any_model.py::test_what_changes_of_a_forward_counts",
    ),
    Fault(
        "a forward with side effects is read",
        "lenet_fast/captured.py",
        'side_effect_replay_policy="error"',
        'side_effect_replay_policy="info"',
        "tests/test_any_model.py::test_forwards_that_someone_wrote",
    ),
    Fault(
        "running statistics stay those of a step that was not taken",
        "lenet_fast/model_steps.py",
        "            if not math.isfinite(value):\n                _put_back(buffers)\n",
        "            if not math.isfinite(value):\n                pass\n",
        "tests/test_any_model.py::test_a_step_whose_loss_is_not_finite_is_not_taken",
    ),
    Fault(
        "a second derivative is taken through the record of the first forward",
        "lenet_fast/differentiable.py",
        "if torch.is_grad_enabled():  # create_graph",
        "if False:  # create_graph",
        "tests/test_transforms.py::test_gradcheck_and_gradgradcheck",
    ),
    Fault(
        "vmap takes the first dimension of the images, whichever it was told",
        "lenet_fast/differentiable.py",
        "batched = args[0].movedim(in_dims[0], 0)",
        "batched = args[0]",
        "tests/test_transforms.py::test_torch_func",
    ),
    Fault(
        "the padding 'same' of an even kernel is on the wrong side",
        "lenet_fast/functional.py",
        "F.pad(input, (0, 1, 0, 1))",
        "F.pad(input, (1, 0, 1, 0))",
        "tests/test_operators.py::test_unbatched_input_and_padding_names",
    ),
    Fault(
        "a wrong entry in the connection table of C3",
        "lenet_fast/tables.py",
        "0134 1245 0235 012345",
        "0134 1245 0245 012345",
        "tests/test_nn.py::test_lenet5_c3_is_the_table_of_the_paper",
    ),
    Fault(
        "digits are padded with 0 instead of the background",
        "lenet_fast/lenet.py",
        "value=self.background)",
        "value=0.0)",
        "tests/test_models.py::test_prepare_maps_0_to_background_and_255_to_foreground_and_pads",
    ),
    Fault(
        "initial weights do not depend on the seed",
        "lenet_fast/train.py",
        "torch.default_generator.manual_seed(config.seed)",
        "torch.default_generator.manual_seed(0)",
        "tests/test_train.py::test_a_seed_fixes_the_run_and_leaves_the_global_generator",
    ),
    Fault(
        "an epoch's loss is the mean of its batches, whatever their sizes",
        "lenet_fast/train.py",
        '(losses.to("cpu", torch.float64) @ sizes).item() / size',
        'losses.to("cpu", torch.float64).mean().item()',
        "tests/test_train.py::test_history_counts_every_image_once",
    ),
    Fault(
        "an error of an engine is taken for exhausted memory",
        "lenet_fast/train.py",
        "if (reason := out_of_memory(error)) is None:",
        'if (reason := out_of_memory(error) or "?") is None:',
        "tests/test_run_folder.py::test_another_error_of_an_engine_is_itself",
    ),
    Fault(
        "resuming does not restore the generator of the orders",
        "lenet_fast/train.py",
        "        saved.restore_generator(run.generator)\n",
        "",
        "tests/test_train.py::test_resumed_run_equals_an_uninterrupted_one_bit_for_bit",
    ),
    Fault(
        "infinite values of a checkpoint are believed",
        "lenet_fast/saved_run.py",
        "(~found.isfinite()).sum()",
        "found.isnan().sum()",
        "tests/test_saved_run.py::test_whatever_an_entry_has_become_is_said",
    ),
    Fault(
        "a checkpoint's entries that are missing or unknown are not looked for",
        "lenet_fast/checkpoint.py",
        "if checkpoint.keys() != _KEYS:",
        "if not checkpoint:",
        "tests/test_saved_run.py",
    ),
    Fault(
        "a checkpoint is not on disk before it takes the place of the last one",
        "lenet_fast/checkpoint.py",
        "            os.fsync(file.fileno())\n",
        "",
        "tests/test_run_folder.py::test_a_file_is_on_disk_before_it_takes_the_place_of_the_old_one",
    ),
    Fault(
        "a checkpoint is written over the last one, not in its place",
        "lenet_fast/checkpoint.py",
        "os.replace(temporary, path)",
        "path.write_bytes(content)",
        "tests/test_run_folder.py::test_a_file_is_on_disk_before_it_takes_the_place_of_the_old_one",
    ),
    Fault(
        "the lock of a run folder can be had twice",
        "lenet_fast/run_folder.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "tests/test_run_folder.py::test_a_folder_is_refused_by_the_name_of_the_process_that_uses_it",
    ),
    Fault(
        "labels above 9 in a data file are taken",
        "lenet_fast/data.py",
        "if labels.max() > 9:",
        "if labels.max() > 99:",
        "tests/test_data.py::test_load_refuses_files_that_do_not_fit",
    ),
    Fault(
        "what was downloaded is not compared with its MD5",
        "lenet_fast/data.py",
        "if found.hexdigest() != md5:",
        "if not received:",
        "tests/test_data.py::test_download_tries_the_next_mirror_and_reports_each_failure",
    ),
    Fault(
        "a drawn digit's centre of mass is a pixel off",
        "lenet_fast/images.py",
        "round(_CENTRE - float(",
        "round(_CENTRE + 1 - float(",
        "tests/test_images.py::test_the_form_is_mnists",
    ),
    Fault(
        "Flax's first dense layer keeps the order of its rows",
        "lenet_fast/interop.py",
        "inputs, in_maps = in_maps, layers[-1].out",
        "inputs = in_maps",
        "tests/test_interop.py::test_first_dense_layer_takes_its_rows_in_flax_order",
    ),
)

_INTERPRETED = "tests/test_triton.py -m interpreted -k 'not compile and not twice'"
TRITON = (
    Fault(
        "the column behind the last one counts as part of the image",
        "lenet_fast/triton_kernels.py",
        "& (x + kx < width)",
        "& (x + kx <= width)",
        _INTERPRETED,
    ),
    Fault(
        "the bias is dropped where there is a table of connections",
        "lenet_fast/triton_kernels.py",
        "    if BIAS:\n",
        "    if BIAS and not SPARSE:\n",
        _INTERPRETED,
    ),
    Fault(
        "the input gradient takes the kernels as they lie",
        "lenet_fast/triton_kernels.py",
        "tap = K * K - 1 - tap",
        "tap = tap",
        _INTERPRETED,
    ),
    Fault(
        "the gradient of average pooling is not divided by 4",
        "lenet_fast/triton_kernels.py",
        "upstream *= 0.25",
        "upstream *= 1.0",
        _INTERPRETED,
    ),
    Fault(
        "the weight gradient of a program includes the images of the next one",
        "lenet_fast/triton_kernels.py",
        "end = tl.minimum(image + images_per_program, batch)",
        "end = tl.minimum(image + images_per_program + 1, batch)",
        _INTERPRETED,
    ),
    Fault(
        "of equal values the last one is the largest of a window",
        "lenet_fast/triton_kernels.py",
        "winner = tl.min(tl.where(z == best[:, None, :], position, WINDOW * WINDOW), axis=1)",
        "winner = tl.max(tl.where(z == best[:, None, :], position, -1), axis=1)",
        "tests/test_operators.py::test_of_equal_values_the_first_is_the_largest -k cpu-triton",
    ),
    Fault(
        "the derivative of scaled_tanh lacks its slope",
        "lenet_fast/triton_kernels.py",
        "slope = (1.0 - y * y) * (AMPLITUDE * SLOPE)",
        "slope = (1.0 - y * y) * AMPLITUDE",
        _INTERPRETED,
    ),
    Fault(
        "the gradient of the distances lacks its factor",
        "lenet_fast/triton_dense_kernels.py",
        "(2.0 * sums)",
        "(1.0 * sums)",
        _INTERPRETED,
    ),
)

_OPERATORS = "tests/cuda_host/kernels.py -k test_float64"
_STEPS = "tests/cuda_host/network.py -k 'test_models or test_other_networks'"
_REGULARISED = "tests/cuda_host/regularisation.py -k test_dropout_at_every_place"
CUDA = (
    Fault(
        "a window writes beyond the right border of an odd output",
        "csrc/cuda/convolution.cuh",
        "          if (row < conv_height && column < conv_width) {",
        "          if (row < conv_height && column <= conv_width) {",
        _OPERATORS,
    ),
    Fault(
        "pixels are staged while others still read the last ones",
        "csrc/cuda/convolution.cuh",
        "          __syncthreads();  // everybody is done with what was staged before\n",
        "",
        "tests/cuda_host/kernels.py -k test_many_images",
        check="races",
    ),
    Fault(
        "the input gradient has the padding of the convolution",
        "csrc/cuda/conv_act_pool.cuh",
        "layer.padding = of.kernel_size - 1 - of.padding;",
        "layer.padding = of.padding;",
        _OPERATORS,
    ),
    Fault(
        "the weight gradient leaves out the first row of the padding",
        "csrc/cuda/gradients.cuh",
        "const bool inside = pixel_y >= 0 &&",
        "const bool inside = pixel_y > 0 &&",
        _OPERATORS,
    ),
    Fault(
        "sums are put where gradients are still read",
        "csrc/cuda/whole_image_backward.cuh",
        "  __syncthreads();  // the gradients are read: their memory is scratch now\n",
        "",
        "tests/cuda_host/kernels.py -k test_many_images",
        check="races",
    ),
    Fault(
        "a block's sum lacks its last warp",
        "csrc/cuda/reduction.cuh",
        "for (int w = 1; w < warps; ++w) {",
        "for (int w = 1; w + 1 < warps; ++w) {",
        _OPERATORS,
    ),
    Fault(
        "of equal values the last one is the largest of a window",
        "csrc/cuda/numeric.cuh",
        "const bool takes_over = z[i] > value ||",
        "const bool takes_over = z[i] >= value ||",
        "tests/test_operators.py::test_of_equal_values_the_first_is_the_largest -k cpu-native",
    ),
    Fault(
        "the sums of the last step are not cleared",
        "csrc/cuda/network_images.cuh",
        "    fill_zero(shared + conv.sums, conv.num_sums());\n",
        "",
        _STEPS,
    ),
    Fault(
        "the gradient of the distances has the wrong sign",
        "csrc/cuda/network_images.cuh",
        "grad *= -2.0f;",
        "grad *= 2.0f;",
        _STEPS,
    ),
    Fault(
        "the loss is taken before all scores are there",
        "csrc/cuda/network_images.cuh",
        "    clock.end(Phase::score);\n",
        "",
        "tests/cuda_host/network.py -m races -k test_other_networks",
        check="races",
    ),
    Fault(
        "a label beyond the classes is taken",
        "csrc/cuda/network_images.cuh",
        "const bool valid = label >= 0 && label < n.classes;",
        "const bool valid = label >= 0;",
        "tests/cuda_host/network.py -k test_a_step_with_what_does_not_exist_is_not_taken",
    ),
    Fault(
        "AdamW does not decay the weights",
        "csrc/cuda/network_update.cuh",
        "    value = value * u.shrink;\n",
        "",
        _STEPS,
    ),
    Fault(
        "a step is updated before all blocks have their sums",
        "csrc/cuda/train_network.cu",
        "    cooperative_groups::this_grid().sync();\n    clock.stamp(Phase::first_barrier);\n",
        "",
        _STEPS,
    ),
    Fault(
        "a number of steps that fills its graphs is launched without the ones that load the kernels",
        "csrc/cuda/train_network.cu",
        "(n.steps - 1) % kGraphSteps + 1;",
        "n.steps % kGraphSteps;",
        "tests/cuda_host/network.py -k test_many_launches_are_graphs",
    ),
    Fault(
        "the optimizer counts all steps, also of a run that was stopped",
        "csrc/cuda/train_network.cu",
        "*n.stopped != 0 ? *n.stopped - 1 : n.steps",
        "n.steps",
        "tests/cuda_host/network.py -k 'diverges_says_where or interruption'",
    ),
    Fault(
        "what is dropped of a dense layer's output still has a gradient",
        "csrc/cuda/network_images.cuh",
        "      drop_at(n.num_convs + l + 1, grad_output, 1, 1);\n",
        "",
        _REGULARISED,
    ),
    Fault(
        "the derivative of an activation is taken from the output that is left of it",
        "csrc/cuda/network_images.cuh",
        "is_masked ? activate<A.value>(z) : output[out]",
        "is_masked ? output[out] : output[out]",
        _REGULARISED,
    ),
    Fault(
        "the background that was dropped of one image is missing in the next",
        "csrc/cuda/network_images.cuh",
        "if (has_dropout && n.dropout.at[0].is_active()) {",
        "if (has_dropout && n.steps < 0) {",
        "tests/cuda_host/regularisation.py -k test_bytes",
    ),
    Fault(
        "the gradient of smoothed labels lacks the share of the other classes",
        "csrc/cuda/network_images.cuh",
        "(c == label ? 1.0f - n.label_smoothing : 0.0f) + of_each;",
        "(c == label ? 1.0f - n.label_smoothing : 0.0f);",
        "tests/cuda_host/regularisation.py -k test_label_smoothing",
    ),
    Fault(
        "values are used before all threads have dropped theirs",
        "csrc/cuda/network_images.cuh",
        "static_cast<uint32_t>(image)}, values, plane, stride);\n        __syncthreads();\n",
        "static_cast<uint32_t>(image)}, values, plane, stride);\n",
        "tests/cuda_host/regularisation.py -m races",
        check="races",
    ),
)

_OF_OPERATORS = "tests/test_operators.py -k 'cpu-native and (float64 or random_shapes or nan_and_infinity)'"
_OF_NETWORKS = "tests/test_random_networks.py::test_outputs_loss_and_gradients_are_those_of_autograd"
_OF_UPDATES = "tests/test_trainer.py::test_float64_steps_equal_autograd_and_torch_optim"
_OF_MASKS = "tests/test_regularised_steps.py::test_dropout_at_every_place_equals_autograd_on_the_same_masks"
CPU = (
    Fault(
        "the bias of a convolution is dropped",
        "csrc/cpu/conv_block.h",
        "const Vec<T> start = layer.bias != nullptr ? splat(layer.bias[map]) : Vec<T>{};",
        "const Vec<T> start{};",
        _OF_OPERATORS,
    ),
    Fault(
        "of equal values the last one is the largest of a window",
        "csrc/cpu/conv_block.h",
        "return (value > best) | (value != value);",
        "return (value >= best) | (value != value);",
        "tests/test_operators.py::test_of_equal_values_the_first_is_the_largest -k cpu-native",
    ),
    Fault(
        "the gradient of average pooling is divided by 2",
        "csrc/cpu/conv_block_backward.h",
        "P == Pool::avg ? T(0.25)",
        "P == Pool::avg ? T(0.5)",
        _OF_OPERATORS,
    ),
    Fault(
        "the input gradient begins a row of the kernel too early",
        "csrc/cpu/conv_block_backward.h",
        "std::max<int64_t>(0, row - g.conv_height() + 1);",
        "std::max<int64_t>(0, row - g.conv_height());",
        _OF_OPERATORS,
    ),
    Fault(
        "the derivative of ReLU at 0 is 1",
        "csrc/cpu/dense_block.h",
        "return y <= T(0) ? Vec<T>{} : splat(T(1));",
        "return y < T(0) ? Vec<T>{} : splat(T(1));",
        _OF_NETWORKS,
    ),
    Fault(
        "the derivative of scaled_tanh is taken at the scaled value",
        "csrc/cpu/dense_block.h",
        "const Vec<T> t = y * T(1 / kScaledTanhAmplitude);",
        "const Vec<T> t = y;",
        _OF_NETWORKS,
    ),
    Fault(
        "the gradient of the scores overwrites what the last activation's derivative needs",
        "csrc/cpu/network_pass.h",
        "dense_differentiate<T>(g_.dense[l], dense_output(b, l), memory_ + block.grad_dense[l + 1]);",
        "dense_differentiate<T>(g_.dense[l], memory_ + block.grad_dense[l + 1], memory_ + block.grad_dense[l + 1]);",
        _OF_NETWORKS,
    ),
    Fault(
        "the gradient of the distances has the wrong sign",
        "csrc/cpu/loss_block.h",
        "grad_features[i] = T(-2) * sum;",
        "grad_features[i] = T(2) * sum;",
        _OF_NETWORKS,
    ),
    Fault(
        "the sums of the last step are not cleared",
        "csrc/cpu/network_pass.h",
        "    blocks.clear_sums();\n",
        "",
        _OF_UPDATES,
    ),
    Fault(
        "SGD decays the weights beside the momentum, as AdamW does",
        "csrc/cpu/update.h",
        "if (u.optimizer == Optimizer::adamw) {",
        "if (u.optimizer != Optimizer::adam) {",
        _OF_UPDATES,
    ),
    Fault(
        "Adam's second moment is corrected by the first one's beta",
        "csrc/network.h",
        "std::sqrt(1 - std::pow(s.beta2, step))",
        "std::sqrt(1 - std::pow(s.beta1, step))",
        _OF_UPDATES,
    ),
    Fault(
        "few images: a smaller digit lies at the left border",
        "csrc/cpu/network_train_few.h",
        "(g.height - images.height) / 2 * g.width + (g.width - images.width) / 2;",
        "(g.height - images.height) / 2 * g.width;",
        "tests/test_trainer.py::test_bytes_are_the_floats_that_they_become",
    ),
    Fault(
        "few images: the input gradient of the bands is added to what was there",
        "csrc/cpu/bands.h",
        "  std::fill(grad_input, grad_input + image.batch * image.in_channels * image.height * image.width, T(0));\n",
        "",
        _OF_OPERATORS,
    ),
    Fault(
        "few images: the tail of a dense layer's row leaves out a value",
        "csrc/cpu/network_few.h",
        "lane_index<T>() >= taken ?",
        "lane_index<T>() > taken ?",
        _OF_NETWORKS,
    ),
    Fault(
        "the loss of a smaller last batch is divided by a whole one's size",
        "csrc/bind_training.cpp",
        "step_.factor = static_cast<T>(1.0 / static_cast<double>(batch));",
        "step_.factor = static_cast<T>(1.0 / static_cast<double>(t_.batch_size));",
        "tests/test_trainer.py::test_a_run_is_the_loop_anyone_would_write",
    ),
    Fault(
        "the native trainer does not check the order",
        "csrc/bind_training.cpp",
        'image = order_[i] = checked("order", read_once(order, i), i, training.num_images);',
        "image = order_[i] = read_once(order, i);",
        "tests/test_trainer.py::test_images_and_labels_are_checked",
    ),
    Fault(
        "a record that was moved is read as if it were aligned",
        "csrc/bind_cpu.cpp",
        "reinterpret_cast<uintptr_t>(record->const_data_ptr()) % 64 == 0;",
        "reinterpret_cast<uintptr_t>(record->const_data_ptr()) % 4 == 0;",
        "tests/test_operators.py::test_what_is_saved_for_backward_may_come_back_from_anywhere",
    ),
    Fault(
        "a record of other operands is taken",
        "csrc/bind_cpu.cpp",
        "record->numel() != total_record_size(kernel, bands) || ",
        "",
        "tests/test_operators.py::test_a_large_batch_keeps_no_record",
    ),
    Fault(
        "memory that was freed is read",
        "csrc/operands.h",
        "if (available < needed || tensor.const_data_ptr() == nullptr) {",
        "if (available < 0) {",
        "tests/test_freed_memory.py",
    ),
    Fault(
        "a connection behind the table's end is taken",
        "csrc/operands.h",
        "if (index <= previous || index >= out_channels * in_channels) {",
        "if (index <= previous) {",
        "tests/test_arguments.py::test_raw_sparse_operator_refuses_wrong_connections",
    ),
    Fault(
        "memory prepared for images of another height is used",
        "csrc/bind_inference.cpp",
        "images.are_bytes ? images.height : -1,",
        "0,",
        "tests/test_native_forward.py::test_bytes_without_rows_leave_nothing_for_floats",
    ),
    Fault(
        "what dropout keeps is not scaled up",
        "csrc/dropout.h",
        "static_cast<T>(p < 1 ? 1 / (1 - p) : 0)",
        "static_cast<T>(p < 1 ? 1 : 0)",
        _OF_MASKS,
    ),
    Fault(
        "what is dropped of a dense layer's output still has a gradient",
        "csrc/cpu/network_pass.h",
        "        drop(g_.num_convs + l + 1, b, first_image, {memory_ + block.grad_dense[l + 1], 1, 1});\n",
        "",
        _OF_MASKS,
    ),
    Fault(
        "the second block of images takes the masks of the first",
        "csrc/cpu/network_pass.h",
        "static_cast<uint32_t>(first_image + b * kLanes<T>)",
        "static_cast<uint32_t>(first_image)",
        _OF_MASKS,
    ),
    Fault(
        "the background that was dropped of some images is missing in the next",
        "csrc/cpu/network_pass.h",
        "if (images.are_bytes && drops(0)) {",
        "if (images.are_bytes && first < 0) {",
        "tests/test_regularised_steps.py::test_bytes_are_the_floats_that_they_become",
    ),
    Fault(
        "few images: the derivative of an activation is taken from the output that is left of it",
        "csrc/cpu/network_train_few.h",
        "differentiate_few<T>(dense.activation, dense_output(l),",
        "differentiate_few<T>(dense.activation, values_ + at_.dense[l + 1],",
        _OF_MASKS,
    ),
    Fault(
        "few images: an image of bytes begins where the last one's first channel ends",
        "csrc/cpu/network_train_few.h",
        "static_cast<const uint8_t*>(images.data) + index * g.in_channels * pixels;",
        "static_cast<const uint8_t*>(images.data) + index * pixels;",
        "tests/test_regularised_steps.py::test_bytes_are_the_floats_that_they_become",
    ),
    Fault(
        "the gradient of smoothed labels lacks the share of the other classes",
        "csrc/cpu/loss_block.h",
        "(label == index ? of_label : Vec<T>{}) - of_each;",
        "(label == index ? of_label : Vec<T>{});",
        "tests/test_regularised_steps.py::test_label_smoothing_is_that_of_cross_entropy",
    ),
    Fault(
        "the images of a step are counted anew in every chunk",
        "csrc/bind_training.cpp",
        "step_.first_image = at;",
        "step_.first_image = 0;",
        "tests/test_regularised_steps.py::test_a_large_batch_takes_several_chunks",
    ),
    Fault(
        "all steps of a call take the masks of the first",
        "csrc/bind_training.cpp",
        "t_.dropout.step.index + static_cast<uint32_t>(number);",
        "t_.dropout.step.index;",
        "tests/test_regularised_steps.py::test_steps_in_two_calls_are_the_steps_of_one",
    ),
)

FAULTS = (*PYTHON, *TRITON, *CUDA, *CPU)
