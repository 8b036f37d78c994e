// Launches on the tensor's device and torch's current stream of it; errors in words.
#pragma once

#include <cuda_runtime.h>

#include "../ops.h"

// Of libtorch_cuda, which a torch without CUDA does not have: the library must load there too, and never gets here.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace compact {

class OnDevice {
 public:
  explicit OnDevice(int32_t device) {
    cudaGetDevice(&previous_);
    if (previous_ != device) cudaSetDevice(device);
    changed_ = previous_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline cudaStream_t current_stream(Check& check, int32_t device) {
  void* stream = nullptr;
  if (check(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA")) {
    const AOTITorchError error = aoti_torch_get_current_cuda_stream(device, &stream);
    check(error == AOTI_TORCH_SUCCESS, "torch has no current stream of device ", device);
  }
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(Check& check, const char* op) {
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, op, " could not be launched: ", cudaGetErrorString(error));
}

// A tensor's data, checked to be what a kernel takes it for: contiguous, on the device, at least `count` long.
template <class T>
T* data_of(Check& check, const Tensor& tensor, int64_t count, int32_t device, const char* name) {
  check(
      tensor.is_cuda() && tensor.get_device_index() == device && tensor.is_contiguous() && tensor.numel() >= count,
      name, " is contiguous, on the device of the others, and has ", count, " entries at least");
  check(tensor.element_size() == sizeof(T), name, " is of another dtype");
  return check.failed() ? nullptr : static_cast<T*>(tensor.data_ptr());
}

}  // namespace compact
