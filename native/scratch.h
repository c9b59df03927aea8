// Memory of a thread, kept from call to call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

// A piece of 64-byte aligned memory that only grows.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(memory); }

    template <typename T> T* get(int64_t count) {
        size_t wanted = (size_t(count) * sizeof(T) + 63) / 64 * 64;
        if (wanted > bytes) {
            std::free(memory);
            bytes = 0;
            memory = std::aligned_alloc(64, wanted);
            if (memory == nullptr) throw std::bad_alloc();
            bytes = wanted;
        }
        return static_cast<T*>(memory);
    }

private:
    void* memory = nullptr;
    size_t bytes = 0;
};
