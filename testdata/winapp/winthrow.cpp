// A Windows program for tests: its threads throw C++ exceptions through a
// function of a DLL all the time, catch them above it, and check that every
// object on the way was destroyed once and that no value of theirs was lost.
//
//   winthrow.exe DLL      answers "state" on its standard input
//
// x86_64-w64-mingw32-g++ -O2 -static -o winthrow.exe winthrow.cpp
#include <atomic>
#include <cstdio>
#include <cstring>
#include <windows.h>

typedef int (*function)(int);
typedef void (*setter)(function);

static function through;
static std::atomic<long long> calls, caught, wrong, made, destroyed;

struct object {
	object() { made++; }
	~object() { destroyed++; }
};

static int callback(int x)
{
	object below;
	if (x % 2)
		throw x * 3;
	return x;
}

// Values in registers that a callee must save, around the call that throws.
__attribute__((noinline)) static bool once(int x)
{
	long long a = x + 1, b = x * 2, c = x ^ 0x55, d = x - 9;
	__asm__ volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d));
	bool threw = false;
	int v = 0;
	try {
		object above;
		v = through(x);
	} catch (int thrown) {
		threw = thrown == x * 3;
		caught++;
	}
	__asm__ volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d));
	calls++;
	bool right = a == x + 1 && b == x * 2 && c == (x ^ 0x55) && d == x - 9;
	return right && (x % 2 ? threw : v == x + 42 || v == x + 43);
}

static DWORD WINAPI thrower(void *arg)
{
	for (int x = 0;; x = (x + 1) & 0xffff) {
		if (!once(x))
			wrong++;
		if (x % 64 == 0)
			Sleep(0);
	}
}

int main(int argc, char **argv)
{
	char line[64];
	setvbuf(stdout, NULL, _IONBF, 0);
	HMODULE m = argc > 1 ? LoadLibraryA(argv[1]) : NULL;
	if (!m)
		return 1;
	through = (function)(void *)GetProcAddress(m, "through");
	((setter)(void *)GetProcAddress(m, "set_callback"))(callback);
	for (int i = 0; i < 3; i++)
		CreateThread(NULL, 0, thrower, NULL, 0, NULL);
	printf("ready %lu\n", GetCurrentProcessId());
	while (fgets(line, sizeof line, stdin)) {
		// What is made and not yet destroyed is on the stacks of three threads.
		long long gone = destroyed, there = made;
		printf("%d calls %lld caught %lld wrong %lld undestroyed %lld\n", through(0), calls.load(), caught.load(), wrong.load(), there - gone);
	}
	return 0;
}
