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

// Arrays one behind the other in one piece of memory, each 64-byte aligned; without memory they are only counted.
class Places {
public:
    explicit Places(char* memory) : memory(memory) {}

    template <typename T> void take(T*& piece, int64_t count) {
        if (memory != nullptr) piece = reinterpret_cast<T*>(memory + taken);
        taken += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    }
    int64_t bytes() const { return taken; }

private:
    char* memory;
    int64_t taken = 0;
};
