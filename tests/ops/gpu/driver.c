/* A driver for tests: its device is the main memory, and a kernel is a C function that reads its parameters. */
#include <cuda.h>
#include <stdint.h>
#include <string.h>

static int fail = 0, device = 0, launches = 0, early = 0, capturing = 0;

void set_fail(int value) { fail = value; }
void set_device(int value) { device = value; }
void set_capturing(int value) { capturing = value; }
int count_launches(void) { return launches; }
int count_early(void) { return early; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **parameters, void **extra) {
    if (fail) return CUDA_ERROR_LAUNCH_FAILED;
    launches++;
    early += config->numAttrs == 1 && config->attrs[0].value.programmaticStreamSerializationAllowed == 1;
    for (unsigned i = 0; i < config->gridDimX; i++) ((void (*)(void **, unsigned))(uintptr_t)f)(parameters, i);
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
                                const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
    const uint64_t all[] = {(uintptr_t)address, type, rank, sizes[0], sizes[1], strides[0], box[0], box[1], swizzle};
    memset(map, 0, sizeof(*map));
    memcpy(map, all, sizeof(all));
    return sizes[1] ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuTensorMapReplaceAddress(CUtensorMap *map, void *address) {
    memcpy(map, &address, sizeof(address));
    return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t count, CUstream stream) {
    memset((void *)address, value, count);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *out) {
    *out = device;
    return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    *status = capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **said) {
    *said = "the test wanted it";
    return CUDA_SUCCESS;
}

/* y[row, n] = x[row, k] * scale[0] + total[0], of the first n = 2 channels; counts rows in total, which has to begin at 0. */
void scaled(void **p, unsigned row) {
    const float *x = *(float **)p[0], *scale = *(float **)p[1];
    float *y = *(float **)p[2], *total = *(float **)p[3];
    const int64_t stride = *(int64_t *)p[4];
    total[0] += 1;
    for (int i = 0; i < 2; i++) y[2 * row + i] = x[row * stride + i] * scale[0] + total[0];
}

/* y[0] = the address in a map is that of x, and its sizes are those that follow. */
void looked(void **p, unsigned row) {
    const uint64_t *map = p[0];
    float *y = *(float **)p[5];
    y[0] = map[0] == *(uint64_t *)p[6] && map[3] == (uint64_t) * (int32_t *)p[2] && map[4] == (uint64_t) * (int32_t *)p[1];
    y[1] = ((uintptr_t)map) % 64 == 0;
}

/* code[row, k] = 2 x[row, k], for all 4 channels. */
void coded(void **p, unsigned row) {
    const float *x = *(float **)p[0];
    float *code = *(float **)p[1];
    for (int i = 0; i < 4; i++) code[4 * row + i] = 2 * x[row * 4 + i];
}

/* y[row, n] = code[row, n] * scale[0], of the first n = 2 channels. */
void multiplied(void **p, unsigned row) {
    const float *code = *(float **)p[0], *scale = *(float **)p[1];
    float *y = *(float **)p[2];
    for (int i = 0; i < 2; i++) y[2 * row + i] = code[row * 4 + i] * scale[0];
}
