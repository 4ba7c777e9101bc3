"""Triton kernels: fused convolution + activation + 2x2 pooling, dense or with a connection table, and its gradients.

With M = maps * channels * K*K * convolution pixels multiply-adds an image (absent connections count: the output maps of
a tile are computed together, with weight 0 where there is no connection):
  forward   2 M operations; reads the input, writes the pooled output
  backward  2 M each for the recomputed pre-activation, the weight gradient and the input gradient; the pre-activation
            gradient goes through memory once

Values are (output maps, window positions, pixels) with the pixels on the threads: a thread holds the maps and the whole
2x2 window of its pixels, so that pooling exchanges nothing between threads. Sums are taken in float64 for float64 and
in float32 otherwise. Arguments in capitals are compile-time constants.

Loops with a bound known at run time are written with while: under NumPy 2.4 the interpreter of Triton 3.6 cannot take
the bound of a range from an argument (triton-lang/triton issue 9171).
"""

import triton
import triton.language as tl

from . import reference

AMPLITUDE = tl.constexpr(reference.SCALED_TANH_AMPLITUDE)
SLOPE = tl.constexpr(reference.SCALED_TANH_SLOPE)

# --- activations, with the formulas of csrc/cpu/vec_math.h: tl.exp and tl.sigmoid lose digits where |x| is large ------


@triton.jit
def exp_nonpositive(x):
    """exp(x) for x <= 0."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        x = tl.where(x < -104.0, -104.0, x)
        shifted = x * 1.4426950408889634 + 12582912.0  # 1.5 * 2**23: the low bits now hold round(x / ln 2)
        n = shifted - 12582912.0
        r = (x - n * 0.693359375) + n * 2.12194440e-4
        exponent = shifted.to(tl.int32, bitcast=True) - 0x4B400000
        half = exponent >> 1  # 2**exponent in two steps: it may be subnormal
        result = tl.exp2(r * 1.4426950408889634) * ((half + 127) << 23).to(tl.float32, bitcast=True)
        result *= ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    return result


@triton.jit
def sigmoid(z):
    e = exp_nonpositive(tl.where(z > 0, -z, z))
    return tl.where(z > 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(z):
    """Polynomial (float32) or rational (float64) below 5/8, where 1 - exp would cancel; S. Moshier, Cephes."""
    magnitude = tl.where(z < 0, -z, z)
    e = exp_nonpositive(-2.0 * magnitude)
    large = (1.0 - e) / (1.0 + e)
    s = z * z
    if z.dtype == tl.float64:
        p = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3
        q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3
        small = p / q * s * z + z
    else:
        p = ((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1
        small = (p * s - 3.33332819422e-1) * s * z + z
    return tl.where(magnitude < 0.625, small, tl.where(z < 0, -large, large))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)  # NaN stays NaN
    elif ACTIVATION == "sigmoid":
        z = sigmoid(z)
    elif ACTIVATION == "tanh":
        z = tanh(z)
    elif ACTIVATION == "scaled_tanh":
        z = tanh(z * SLOPE) * AMPLITUDE
    return z


@triton.jit
def activation_derivative(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        slope = tl.where(z <= 0, 0.0, 1.0).to(z.dtype)
    elif ACTIVATION == "sigmoid":
        y = sigmoid(z)
        slope = y * (1.0 - y)
    elif ACTIVATION == "tanh":
        y = tanh(z)
        slope = 1.0 - y * y
    elif ACTIVATION == "scaled_tanh":
        y = tanh(z * SLOPE)
        slope = (1.0 - y * y) * (AMPLITUDE * SLOPE)
    else:
        slope = tl.full(z.shape, 1.0, z.dtype)
    return slope


# --- convolution -----------------------------------------------------------------------------------------------------


@triton.jit
def pixels_of_program(index, height, width, BLOCK: tl.constexpr):
    """Image (64-bit), row and column of this program's pixels; a program has BLOCK of all images' pixels in order."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    local = (first % (height * width)).to(tl.int32) + index
    pixel = local % (height * width)
    return first // (height * width) + local // (height * width), pixel // width, pixel % width


@triton.jit
def window_lanes(MAPS: tl.constexpr, WINDOW: tl.constexpr, out_height, out_width, BLOCK: tl.constexpr):
    """Map in the tile, image, row and column of (MAPS, WINDOW * WINDOW, BLOCK) values in order.

    Memory is read and written through one dimension only: of several, the compiler would give the threads to another
    than the last.
    """
    lane = tl.arange(0, MAPS * WINDOW * WINDOW * BLOCK)
    image, y, x = pixels_of_program(lane % BLOCK, out_height, out_width, BLOCK)
    y = y * WINDOW + lane // (WINDOW * BLOCK) % WINDOW
    return lane // (WINDOW * WINDOW * BLOCK), image, y, x * WINDOW + lane // BLOCK % WINDOW


@triton.jit
def add_tap(
    z, source, x, valid, width, kernels, present, ky, kx, K: tl.constexpr, PADDED: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """z plus one tap of the kernels times the pixels under it."""
    if PADDED:
        valid = valid & (x + kx >= 0) & (x + kx < width)
    values = tl.load(source + kx, mask=valid, other=0).to(z.dtype)
    tap = ky * K + kx
    if FLIPPED:
        tap = K * K - 1 - tap
    weights = tl.load(kernels + tap, mask=present, other=0).to(z.dtype)
    return z + weights[:, None] * values[None, :]


@triton.jit
def convolve(
    source, image, y, x, batch, channels, height, width, weight, table, map, maps, map_stride, channel_stride,
    K: tl.constexpr, SPARSE: tl.constexpr, PADDED: tl.constexpr, FLIPPED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(maps, lanes): sums over the K x K patches whose top left corners are at y, x.

    The kernel of a map and channel is the one of connection map * map_stride + channel * channel_stride, looked up in
    the table (-1: absent) where there is one.
    """
    z = tl.zeros((map.shape[0], x.shape[0]), DTYPE)
    source += image * channels * height * width + (y * width + x)
    channel = 0
    while channel < channels:
        connection = map * map_stride + channel * channel_stride
        present = map < maps
        if SPARSE:
            connection = tl.load(table + connection, mask=present, other=-1)
            present = connection >= 0
        kernels = weight + connection.to(tl.int64) * (K * K)
        for ky in range(K):
            valid = image < batch
            if PADDED:
                valid = valid & (y + ky >= 0) & (y + ky < height)
            if K <= 7:
                for kx in tl.static_range(K):
                    z = add_tap(z, source + ky * width, x, valid, width, kernels, present, ky, kx, K, PADDED, FLIPPED)
            else:
                for kx in range(K):
                    z = add_tap(z, source + ky * width, x, valid, width, kernels, present, ky, kx, K, PADDED, FLIPPED)
        source += height * width
        channel += 1
    return z


@triton.jit
def pre_activation(
    input, weight, bias, table, map, batch, channels, height, width, maps, out_height, out_width, padding,
    K: tl.constexpr, WINDOW: tl.constexpr, SPARSE: tl.constexpr, BIAS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(maps, window positions, pixels) of this program."""
    DTYPE: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    _, image, y, x = window_lanes(1, WINDOW, out_height, out_width, BLOCK)
    z = convolve(
        input, image, y - padding, x - padding, batch, channels, height, width, weight, table, map, maps,
        channels, 1, K, SPARSE, PADDED, False, DTYPE,
    )  # fmt: skip
    if BIAS:
        z += tl.load(bias + map, mask=map < maps, other=0).to(DTYPE)[:, None]
    return tl.reshape(z, (map.shape[0], WINDOW * WINDOW, BLOCK))


# --- the kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def conv_act_pool_kernel(
    input, weight, bias, coefficient, pool_bias, table, output,
    batch, channels, height, width, maps, out_height, out_width, padding,
    K: tl.constexpr, ACTIVATION: tl.constexpr, POOL: tl.constexpr, SPARSE: tl.constexpr, BIAS: tl.constexpr,
    PADDED: tl.constexpr, MAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Output (batch, maps, out_height, out_width); POOL "subsample" is the trainable one of conv_subsample."""
    WINDOW: tl.constexpr = 1 if POOL == "none" else 2
    map = tl.program_id(1) * MAPS + tl.arange(0, MAPS)
    z = pre_activation(
        input, weight, bias, table, map, batch, channels, height, width, maps, out_height, out_width, padding,
        K, WINDOW, SPARSE, BIAS, PADDED, BLOCK,
    )  # fmt: skip
    if POOL == "max":  # before the activation: every one is nondecreasing
        nan = z != z
        best = tl.max(tl.where(nan, float("-inf"), z), axis=1)
        value = activate(tl.where(tl.max(nan.to(tl.int32), axis=1) > 0, float("nan"), best), ACTIVATION)
    else:
        value = tl.sum(activate(z, ACTIVATION), axis=1)
        if POOL == "avg":
            value *= 0.25
        elif POOL == "subsample":
            factor = tl.load(coefficient + map, mask=map < maps, other=0).to(z.dtype)[:, None]
            offset = tl.load(pool_bias + map, mask=map < maps, other=0).to(z.dtype)[:, None]
            value = activate(factor * value + offset, ACTIVATION)
    row, image, y, x = window_lanes(MAPS, 1, out_height, out_width, BLOCK)
    row += tl.program_id(1) * MAPS
    target = image * maps * out_height * out_width + row.to(tl.int64) * out_height * out_width + (y * out_width + x)
    value = tl.reshape(value, (MAPS * BLOCK,)).to(output.dtype.element_ty)
    tl.store(output + target, value, mask=(row < maps) & (image < batch))


@triton.jit
def pre_activation_gradient_kernel(
    grad_output, input, weight, bias, coefficient, pool_bias, table, grad, partials,
    batch, channels, height, width, maps, out_height, out_width, padding,
    K: tl.constexpr, ACTIVATION: tl.constexpr, POOL: tl.constexpr, SPARSE: tl.constexpr, BIAS: tl.constexpr,
    PADDED: tl.constexpr, MAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of what the windows cover: (batch, maps, out_height, out_width), twice as high and wide if pooled.

    For "subsample" also row program_id(0) of partials (programs, 2 * maps): gradients of coefficient and pool_bias.
    """
    WINDOW: tl.constexpr = 1 if POOL == "none" else 2
    map = tl.program_id(1) * MAPS + tl.arange(0, MAPS)
    z = pre_activation(
        input, weight, bias, table, map, batch, channels, height, width, maps, out_height, out_width, padding,
        K, WINDOW, SPARSE, BIAS, PADDED, BLOCK,
    )  # fmt: skip
    row, image, y, x = window_lanes(MAPS, 1, out_height, out_width, BLOCK)
    row += tl.program_id(1) * MAPS
    source = image * maps * out_height * out_width + row.to(tl.int64) * out_height * out_width + (y * out_width + x)
    valid = (row < maps) & (image < batch)
    upstream = tl.reshape(tl.load(grad_output + source, mask=valid, other=0).to(z.dtype), (MAPS, BLOCK))
    if POOL == "max":  # to the first of equals, and NaN, the last of them, before everything
        position = tl.arange(0, WINDOW * WINDOW)[None, :, None]
        nan = z != z
        best = tl.max(tl.where(nan, float("-inf"), z), axis=1)
        winner = tl.min(tl.where(z == best[:, None, :], position, WINDOW * WINDOW), axis=1)
        last_nan = tl.max(tl.where(nan, position, -1), axis=1)
        winner = tl.where(last_nan >= 0, last_nan, winner)
        best = tl.where(last_nan >= 0, float("nan"), best)
        routed = activation_derivative(best, ACTIVATION) * upstream
        dz = tl.where(position == winner[:, None, :], routed[:, None, :], 0.0)
    else:
        if POOL == "avg":
            upstream *= 0.25
        elif POOL == "subsample":
            factor = tl.load(coefficient + map, mask=map < maps, other=0).to(z.dtype)[:, None]
            offset = tl.load(pool_bias + map, mask=map < maps, other=0).to(z.dtype)[:, None]
            total = tl.sum(activate(z, ACTIVATION), axis=1)
            upstream *= activation_derivative(factor * total + offset, ACTIVATION)
            sums = partials + tl.program_id(0).to(tl.int64) * 2 * maps + map
            total = tl.where(tl.reshape(valid, (MAPS, BLOCK)), total, 0.0)  # else 0 * inf would count
            tl.store(sums, tl.sum(upstream * total, axis=1), mask=map < maps)
            tl.store(sums + maps, tl.sum(upstream, axis=1), mask=map < maps)
            upstream *= factor
        dz = activation_derivative(z, ACTIVATION) * upstream[:, None, :]
    row, image, y, x = window_lanes(MAPS, WINDOW, out_height, out_width, BLOCK)
    row += tl.program_id(1) * MAPS
    height, width = WINDOW * out_height, WINDOW * out_width
    target = image * maps * height * width + row.to(tl.int64) * height * width + (y * width + x)
    tl.store(grad + target, tl.reshape(dz, (MAPS * WINDOW * WINDOW * BLOCK,)), mask=(row < maps) & (image < batch))


@triton.jit
def input_gradient_kernel(
    grad, weight, table, grad_input, batch, channels, height, width, maps, grad_height, grad_width, padding,
    K: tl.constexpr, SPARSE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Input gradient: the pre-activation gradient (batch, maps, grad_height, grad_width) under the flipped kernels."""
    _, image, y, x = window_lanes(1, 1, height, width, BLOCK)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    sums = convolve(
        grad, image, y + (padding - K + 1), x + (padding - K + 1), batch, maps, grad_height, grad_width, weight, table,
        channel, channels, 1, channels, K, SPARSE, True, True, grad.dtype.element_ty,
    )  # fmt: skip
    row, image, y, x = window_lanes(CHANNELS, 1, height, width, BLOCK)
    row += tl.program_id(1) * CHANNELS
    target = image * channels * height * width + row.to(tl.int64) * height * width + (y * width + x)
    value = tl.reshape(sums, (CHANNELS * BLOCK,)).to(grad_input.dtype.element_ty)
    tl.store(grad_input + target, value, mask=(row < channels) & (image < batch))


@triton.jit
def weight_gradient_kernel(
    grad, input, table, partials, batch, channels, height, width, maps, grad_height, grad_width, padding,
    connections, images_per_program,
    K: tl.constexpr, SPARSE: tl.constexpr, MAPS: tl.constexpr, TAPS: tl.constexpr, IMAGES: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """Rows of partials (rows, connections * K*K + maps): weight and bias gradient over some pixels of some images.

    A program takes one row, MAPS maps and TAPS taps of all channels' taps in order; the tap behind the last is the
    bias, whose pixels are 1.
    """
    LANES: tl.constexpr = IMAGES * PIXELS
    map_tiles = tl.cdiv(maps, MAPS)
    tiles = map_tiles * tl.cdiv(channels * K * K + 1, TAPS)
    pixel_tiles = tl.cdiv(grad_height * grad_width, PIXELS)
    line = tl.program_id(0) // tiles
    first_map = tl.program_id(0) % tiles % map_tiles * MAPS
    first_tap = tl.program_id(0) % tiles // map_tiles * TAPS
    first_pixel = line % pixel_tiles * PIXELS
    image = (line // pixel_tiles).to(tl.int64) * images_per_program
    end = tl.minimum(image + images_per_program, batch)

    # (MAPS, LANES) gradients
    lane = tl.arange(0, MAPS * LANES)
    grad_image = lane // PIXELS % IMAGES
    map = first_map + lane // LANES
    pixel = first_pixel + lane % PIXELS
    grad += (image + grad_image) * maps * grad_height * grad_width
    grad += map.to(tl.int64) * grad_height * grad_width + pixel
    grad_inside = (map < maps) & (pixel < grad_height * grad_width)

    # (TAPS, LANES) input pixels
    lane = tl.arange(0, TAPS * LANES)
    input_image = lane // PIXELS % IMAGES
    tap = first_tap + lane // LANES
    pixel = first_pixel + lane % PIXELS
    channel = tap // (K * K)
    y = pixel // grad_width + tap // K % K - padding
    x = pixel % grad_width + tap % K - padding
    input += (image + input_image) * channels * height * width
    input += channel.to(tl.int64) * height * width + (y * width + x)
    inside = (
        (y >= 0) & (y < height) & (x >= 0) & (x < width) & (channel < channels) & (pixel < grad_height * grad_width)
    )
    other = (tap == channels * K * K).to(tl.float32).to(input.dtype.element_ty)

    sums = tl.zeros((MAPS, TAPS, LANES), partials.dtype.element_ty)
    while image < end:
        grads = tl.load(grad, mask=grad_inside & (image + grad_image < end), other=0)
        values = tl.load(input, mask=inside & (image + input_image < end), other=other).to(sums.dtype)
        sums += tl.reshape(grads, (MAPS, LANES))[:, None, :] * tl.reshape(values, (TAPS, LANES))[None, :, :]
        image += IMAGES
        grad += tl.cast(maps, tl.int64) * grad_height * grad_width * IMAGES
        input += tl.cast(channels, tl.int64) * height * width * IMAGES

    map = first_map + tl.arange(0, MAPS)[:, None]
    tap = first_tap + tl.arange(0, TAPS)[None, :]
    connection = map * channels + tap // (K * K)
    is_bias = (map < maps) & (tap == channels * K * K)
    present = (map < maps) & (tap < channels * K * K)
    if SPARSE:
        connection = tl.load(table + connection, mask=present, other=-1)
        present = connection >= 0
    target = tl.where(is_bias, connections * K * K + map, connection * (K * K) + tap % (K * K))
    partials += line.to(tl.int64) * (connections * K * K + maps)
    tl.store(partials + target, tl.sum(sums, axis=2), mask=present | is_bias)


@triton.jit
def sum_rows_kernel(partials, first, second, rows, columns, first_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over the rows of partials in a fixed order: `first_columns` of them into first, the others into second."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), partials.dtype.element_ty)
    start = 0
    while start < rows:
        row = start + tl.arange(0, ROWS)
        source = row.to(tl.int64)[:, None] * columns + column[None, :]
        sums += tl.load(partials + source, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0)
        start += ROWS
    total = tl.sum(sums, axis=0)
    tl.store(first + column, total.to(first.dtype.element_ty), mask=column < first_columns)
    rest = column - first_columns
    tl.store(second + rest, total.to(second.dtype.element_ty), mask=(rest >= 0) & (column < columns))
