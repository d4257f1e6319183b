// Run the operators of a library of csrc/ without PyTorch. This program can be compiled for any architecture. It
// implements the part of PyTorch's C interface that the library uses.
//
// Usage: emulator LIBRARY. The program reads requests from stdin and writes replies to stdout, in the format of
// __main__.py. All numbers have 64 bits. Texts, lists and elements follow their lengths.
//
// It is stricter than PyTorch. A page without access rights follows each allocation. Uninitialized memory is filled
// with 0xFF (NaN). The ranges of a parallel loop run consecutively, the last one first. It is an error if an operator
// does not delete all of its handles.
#include <dlfcn.h>
#include <sys/mman.h>
#include <torch/csrc/stable/c/shim.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

using Sizes = std::vector<int64_t>;
using Operator = void (*)(StableIValue*, uint64_t, uint64_t);

namespace {

std::map<std::string, Operator> operators;
int64_t handles = 0;  // of tensors and lists, not yet deleted
bool inside_a_loop = false;  // a parallel one
constexpr int64_t kThreads = 3;

// Element types: names, PyTorch's numbers of them, and bytes.
#define DTYPES(X)  \
  X(uint8, 0, 1)   \
  X(int32, 3, 4)   \
  X(int64, 4, 8)   \
  X(float16, 5, 2) \
  X(float32, 6, 4) \
  X(float64, 7, 8) \
  X(bool, 11, 1)   \
  X(bfloat16, 15, 2)

[[noreturn]] void give_up(const std::string& reason) {
  std::fprintf(stderr, "emulator: %s\n", reason.c_str());
  std::exit(1);
}

int64_t round_up(int64_t x, int64_t unit) {
  return (x + unit - 1) / unit * unit;
}

std::shared_ptr<char> allocate(int64_t bytes, int64_t alignment) {
  const int64_t page = sysconf(_SC_PAGESIZE), used = round_up(bytes, alignment), open = round_up(used, page);
  void* pages = mmap(nullptr, open + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) give_up("out of memory");
  char* begin = static_cast<char*>(pages);
  mprotect(begin + open, page, PROT_NONE);
  std::memset(begin, 0xFF, open);
  return {begin + open - used, [=](char*) { munmap(pages, open + page); }};
}

}  // namespace

struct AtenTensorOpaque {
  int32_t dtype;
  Sizes sizes, strides;
  std::shared_ptr<char> data;

  int64_t bytes_each() const { return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)); }
  // The elements from the first to the last one, in memory order.
  int64_t span() const {
    int64_t last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == 0) return 0;
      last += (sizes[d] - 1) * strides[d];
    }
    return last + 1;
  }
};
struct StableListOpaque {
  std::vector<StableIValue> items;
};
struct TorchLibraryOpaque {};

namespace {

AtenTensorHandle make(int32_t dtype, Sizes sizes, Sizes strides, int64_t alignment) {
  auto* tensor = new AtenTensorOpaque{dtype, std::move(sizes), std::move(strides), nullptr};
  tensor->data = allocate(tensor->span() * tensor->bytes_each(), alignment);
  ++handles;
  return tensor;
}

AtenTensorHandle copy_densely(const AtenTensorOpaque& x, int32_t dtype) {
  Sizes strides(x.sizes.size());
  int64_t count = 1;
  for (size_t d = x.sizes.size(); d-- > 0; count *= x.sizes[d]) strides[d] = count;
  AtenTensorHandle dense = make(dtype, x.sizes, strides, 64);
  const bool widen = x.dtype == aoti_torch_dtype_int32() && dtype == aoti_torch_dtype_int64();
  if (dtype != x.dtype && !widen) give_up("only int32 is cast, and only to int64");
  for (int64_t i = 0; i < count; ++i) {
    int64_t at = 0, rest = i;
    for (size_t d = x.sizes.size(); d-- > 0; rest /= x.sizes[d]) at += rest % x.sizes[d] * x.strides[d];
    const char* element = x.data.get() + at * x.bytes_each();
    if (widen) reinterpret_cast<int64_t*>(dense->data.get())[i] = *reinterpret_cast<const int32_t*>(element);
    else std::memcpy(dense->data.get() + i * x.bytes_each(), element, x.bytes_each());
  }
  return dense;
}

template <class Handle>
StableIValue as_value(Handle* handle) {
  return reinterpret_cast<StableIValue>(handle);
}

template <class Handle>
Handle as_handle(StableIValue value) {
  return reinterpret_cast<Handle>(value);
}

}  // namespace

// ---- PyTorch's interface --------------------------------------------------------------------------------------------

extern "C" {

uint64_t aoti_torch_abi_version() {
  return TORCH_ABI_VERSION;
}
int32_t aoti_torch_device_type_cpu() {
  return 0;
}
int32_t aoti_torch_memory_format_contiguous_format() {
  return 0;
}

#define NUMBER(name, number, bytes)   \
  int32_t aoti_torch_dtype_##name() { \
    return number;                    \
  }
DTYPES(NUMBER)
#undef NUMBER
size_t aoti_torch_dtype_element_size(int32_t dtype) {
#define SIZE(name, number, bytes) \
  if (dtype == number) return bytes;
  DTYPES(SIZE)
#undef SIZE
  give_up("unknown dtype " + std::to_string(dtype));
}

AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dim) {
  *dim = static_cast<int64_t>(tensor->sizes.size());
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes) {
  *sizes = tensor->sizes.data();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** strides) {
  *strides = tensor->strides.data();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype) {
  *dtype = tensor->dtype;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  *data = tensor->data.get();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_empty_strided(
    int64_t dim,
    const int64_t* sizes,
    const int64_t* strides,
    int32_t dtype,
    int32_t,
    int32_t,
    AtenTensorHandle* made) {
  *made = make(dtype, {sizes, sizes + dim}, {strides, strides + dim}, 64);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* another) {
  *another = new AtenTensorOpaque(*tensor);
  ++handles;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  delete tensor;
  --handles;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_new_list_reserve_size(size_t, StableListHandle* list) {
  *list = new StableListOpaque;
  ++handles;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_list_size(StableListHandle list, size_t* size) {
  *size = list->items.size();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_list_get_item(StableListHandle list, size_t index, StableIValue* item) {
  *item = list->items.at(index);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue item) {
  list->items.push_back(item);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_delete_list(StableListHandle list) {
  delete list;
  --handles;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = kThreads;
  return AOTI_TORCH_SUCCESS;
}
// A loop has as many ranges as in PyTorch. A nested loop has one range.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc function, void* context) {
  if (begin >= end) return AOTI_TORCH_SUCCESS;
  const int64_t size = end - begin, most = inside_a_loop ? 1 : kThreads;
  grain = std::max<int64_t>(1, grain);
  const int64_t ranges = std::min(most, round_up(size, grain) / grain), each = (size + ranges - 1) / ranges;
  const bool outermost = !std::exchange(inside_a_loop, true);
  for (int64_t at = begin + (size - 1) / each * each; at >= begin; at -= each)
    function(at, std::min(at + each, end), context);
  if (outermost) inside_a_loop = false;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_call_dispatcher(const char* name, const char*, StableIValue* stack, uint64_t) {
  auto self = as_handle<AtenTensorHandle>(stack[0]);
  int32_t dtype = self->dtype;
  if (std::strcmp(name, "aten::to") == 0) {
    std::unique_ptr<StableIValue> wanted(as_handle<StableIValue*>(stack[1]));
    if (wanted) dtype = static_cast<int32_t>(*wanted);
  } else if (std::strcmp(name, "aten::contiguous") != 0) {
    give_up(std::string("the emulator has no function ") + name);
  }
  stack[0] = as_value(copy_densely(*self, dtype));
  return aoti_torch_delete_tensor_object(self);
}

AOTITorchError aoti_torch_library_init_impl(
    const char*, const char*, const char*, uint32_t, TorchLibraryHandle* library) {
  *library = new TorchLibraryOpaque;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, Operator function, uint64_t) {
  operators[name] = function;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle library) {
  delete library;
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"

// ---- requests and replies -------------------------------------------------------------------------------------------

namespace {

void read_bytes(void* data, int64_t count) {
  if (std::fread(data, 1, count, stdin) != static_cast<size_t>(count)) give_up("a request is incomplete");
}

int64_t read_number() {
  int64_t number;
  read_bytes(&number, sizeof(number));
  return number;
}

Sizes read_numbers(int64_t count) {
  Sizes numbers(count);
  for (int64_t& number : numbers) number = read_number();
  return numbers;
}

std::string read_text() {
  std::string text(read_number(), ' ');
  read_bytes(text.data(), static_cast<int64_t>(text.size()));
  return text;
}

void write_bytes(const void* data, int64_t count) {
  if (std::fwrite(data, 1, count, stdout) != static_cast<size_t>(count)) give_up("a reply cannot be written");
}

void write_number(int64_t number) {
  write_bytes(&number, sizeof(number));
}

StableIValue read_argument() {
  const int64_t kind = read_number();
  if (kind == 'n') return 0;
  if (kind == 'o') return as_value(new StableIValue(read_argument()));
  if (kind == 'v') return static_cast<StableIValue>(read_number());
  if (kind == 'l') {
    StableListHandle list;
    torch_new_list_reserve_size(0, &list);
    for (int64_t item : read_numbers(read_number())) list->items.push_back(static_cast<StableIValue>(item));
    return as_value(list);
  }
  if (kind != 't') give_up("unknown kind of argument");
  const auto dtype = static_cast<int32_t>(read_number());
  const int64_t dim = read_number();
  Sizes sizes = read_numbers(dim), strides = read_numbers(dim);
  // An argument can be a view of another tensor, so it can begin at any element.
  AtenTensorHandle tensor = make(dtype, sizes, strides, static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)));
  read_bytes(tensor->data.get(), tensor->span() * tensor->bytes_each());
  return as_value(tensor);
}

void write_tensor(StableIValue value) {
  auto tensor = as_handle<AtenTensorHandle>(value);
  write_number(tensor->dtype);
  write_number(static_cast<int64_t>(tensor->sizes.size()));
  for (const Sizes& numbers : {tensor->sizes, tensor->strides})
    for (int64_t number : numbers) write_number(number);
  write_bytes(tensor->data.get(), tensor->span() * tensor->bytes_each());
  aoti_torch_delete_tensor_object(tensor);
}

void write_error(const std::string& message) {
  write_number(1);
  write_number(static_cast<int64_t>(message.size()));
  write_bytes(message.data(), static_cast<int64_t>(message.size()));
}

// A request contains the operator's name, the number of its outputs, 1 if its only output is a list, and the arguments.
void serve() {
  handles = 0;
  inside_a_loop = false;
  const std::string name = read_text();
  const int64_t outputs = read_number();
  const bool list = read_number() != 0;
  std::vector<StableIValue> stack(read_number());
  for (StableIValue& argument : stack) argument = read_argument();
  const auto count = stack.size();
  stack.resize(std::max<size_t>(count, outputs));
  if (!operators.contains(name)) give_up("the library has no operator " + name);
  try {
    operators[name](stack.data(), count, outputs);
  } catch (const std::exception& error) {
    return write_error(error.what());
  }
  std::vector<StableIValue> tensors(stack.begin(), stack.begin() + outputs);
  if (list) {
    auto returned = as_handle<StableListHandle>(stack[0]);
    tensors = returned->items;
    torch_delete_list(returned);
  }
  if (handles != static_cast<int64_t>(tensors.size()))
    give_up(name + " leaves " + std::to_string(handles - static_cast<int64_t>(tensors.size())) + " handles behind");
  write_number(0);
  write_number(static_cast<int64_t>(tensors.size()));
  for (StableIValue tensor : tensors) write_tensor(tensor);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) give_up("usage: emulator LIBRARY");
  // Lazy binding, because only those functions of PyTorch exist that are called.
  if (dlopen(arguments[1], RTLD_LAZY) == nullptr) give_up(dlerror());
  for (int next = std::getchar(); next != EOF; next = std::getchar()) {
    std::ungetc(next, stdin);
    serve();
    std::fflush(stdout);
  }
}
