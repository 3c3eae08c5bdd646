/* Something of everything that the reader reads. */
__declspec(dllimport) int puts(const char *);
__declspec(dllimport) void zap(void);
__declspec(dllimport) void Sleep(unsigned);
__declspec(dllimport) int late(int);

__declspec(dllexport) int answer = 41;
char zeros[9000];

int __C_specific_handler(void *a, void *b, void *c, void *d) { return 1; }
void *__delayLoadHelper2(void *a, void *b) { return 0; }

__declspec(dllexport) int foo(int a) { volatile char b[300]; b[a] = 1; return b[a] + answer + zeros[a]; }
__declspec(dllexport) int bar(int a) { Sleep(1); zap(); return foo(a) * 2 + puts("x") + late(a); }
__declspec(dllexport) int guarded(int *p) { __try { return *p + foo(2); } __except (1) { return -1; } }
__declspec(dllexport) int guarded2(int *p) { __try { return *p + foo(3); } __except (1) { return -2; } }
__declspec(dllexport) int nameless(int a) { return a + 1; }
void *table[] = { foo, bar, &answer };
__declspec(dllexport) int (*pick(int i))(int) { return table[i]; }
