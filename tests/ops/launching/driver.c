/* A CUDA driver without a device: it answers what Triton asks, and writes down what it is to launch.

LAUNCHES names the file that it writes to. Without LAUNCHES it writes nothing, so that a launch takes no time. A driver
knows the parameters of a kernel; here PARAMETERS gives their sizes. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the driver without a device";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 * 1024
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK         ? 65536
           : attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE                       ? 32
                                                                              : 1024;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)strdup(name); /* the name is all there is of a function */
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  const char *path = getenv("LAUNCHES");
  if (!path) {
    return CUDA_SUCCESS;
  }
  FILE *launches = fopen(path, "a");
  fprintf(launches, "%s %u %u %u %u", (char *)function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX);
  for (const char *sizes = getenv("PARAMETERS"); *sizes; sizes += strcspn(sizes, " "), sizes += strspn(sizes, " ")) {
    uint64_t bits = 0;
    memcpy(&bits, *parameters++, atoi(sizes));
    fprintf(launches, " %llu", (unsigned long long)bits);
  }
  fprintf(launches, "\n");
  fclose(launches);
  return CUDA_SUCCESS;
}
