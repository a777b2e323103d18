/* A camera for OpenCV's video plugin interface: index N shows the file $VCAM_DIR/camN that a test writes.
   File: five int32 (width, height, fps, frame number, state) and one BGR frame. state 0: running, 1: reads fail, 2: reads hang for a while,
   3: a tenth of the rate.
   The structures follow OpenCV 4's modules/core/include/opencv2/core/llapi/llapi.h and modules/videoio/src/plugin_capture_api.hpp. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct { int width, height, fps, number, state; } Head;
typedef struct { volatile Head *head; size_t size; double asked_width, asked_height, asked_fps; } Camera;
typedef int (*Deliver)(int, const unsigned char *, int, int, int, int, void *);

enum { OK = 0, FAIL = -1, GSTREAMER = 1800, WIDTH = 3, HEIGHT = 4, FPS = 5, CV_8UC3 = 16, HANG_US = 1200000 };

static int camera_open(const char *name, int index, Camera **out) {
    const char *directory = getenv("VCAM_DIR");
    char path[512];
    struct stat info;
    *out = NULL;
    if (!directory || index < 0) return FAIL;
    snprintf(path, sizeof path, "%s/cam%d", directory, index);
    int file = open(path, O_RDONLY);
    if (file < 0 || fstat(file, &info) < 0) return FAIL;
    Camera *camera = calloc(1, sizeof *camera);
    camera->size = info.st_size;
    camera->head = mmap(NULL, info.st_size, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    *out = camera;
    return OK;
}
static int camera_release(Camera *camera) {
    munmap((void *)camera->head, camera->size);
    free(camera);
    return OK;
}
static int camera_get(Camera *camera, int property, double *value) {
    if (property == WIDTH) *value = camera->head->width;
    else if (property == HEIGHT) *value = camera->head->height;
    else if (property == FPS) *value = camera->head->fps;
    else return FAIL;
    return OK;
}
static int camera_set(Camera *camera, int property, double value) {
    double actual;
    return camera_get(camera, property, &actual) == OK && actual == value ? OK : FAIL;
}
static int camera_grab(Camera *camera) {
    if (camera->head->state == 2) usleep(HANG_US);
    usleep((camera->head->state == 3 ? 10000000 : 1000000) / camera->head->fps);
    return camera->head->state == 0 || camera->head->state == 3 ? OK : FAIL;
}
static int camera_retrieve(Camera *camera, int stream, Deliver deliver, void *userdata) {
    int width = camera->head->width, height = camera->head->height;
    return deliver(stream, (const unsigned char *)(camera->head + 1), width * 3, width, height, CV_8UC3, userdata);
}
static int camera_open_with(const char *name, int index, int *params, unsigned count, Camera **out) { return camera_open(name, index, out); }

static const struct {
    size_t valid_size;
    unsigned abi_version, api_version, major, minor, patch;
    const char *status, *description;
    int id;
    int (*open)(const char *, int, Camera **);
    int (*release)(Camera *);
    int (*get)(Camera *, int, double *);
    int (*set)(Camera *, int, double);
    int (*grab)(Camera *);
    int (*retrieve)(Camera *, int, Deliver, void *);
    int (*open_with)(const char *, int, int *, unsigned, Camera **);
} API = {sizeof API, 1, 1, OPENCV_MAJOR, OPENCV_MINOR, 0, "", "virtual test camera", GSTREAMER, camera_open, camera_release, camera_get,
         camera_set, camera_grab, camera_retrieve, camera_open_with};

const void *opencv_videoio_capture_plugin_init_v1(int abi, int api, void *reserved) { return abi == 1 && api >= 1 ? &API : NULL; }
